"""The patterns of an adapter's configuration, matched within a time: they come from strangers.

Torch-free. Names in which only dots are special are found by hashing, so that a table may have an entry
for each of 20,000 modules.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import NamedTuple

import regex

MATCH_TIMEOUT_S = 0.2
ALL_MATCHES_TIMEOUT_S = 10.0

_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_.]|\\\.)+")
_SIGNS = re.compile(r"\\?.")


class Matcher:
    """Matches the expressions of one adapter: a limit for each match, and one for all of them.

    Its methods raise TimeoutError once either has passed.
    """

    def __init__(self, left_s: float = ALL_MATCHES_TIMEOUT_S) -> None:
        self._left_s = left_s
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def fullmatch(self, expression: str, text: str) -> bool:
        begun = time.perf_counter()
        found = self._of(expression).fullmatch(text, timeout=MATCH_TIMEOUT_S)
        self.charge(begun)
        return found is not None

    def group(self, expression: str, text: str) -> str | None:
        """The first group of `expression`, matched from the start of `text` on."""
        begun = time.perf_counter()
        found = self._of(expression).match(text, timeout=MATCH_TIMEOUT_S)
        self.charge(begun)
        return found.group(1) if found else None

    def charge(self, begun: float) -> None:
        """Take the time since `begun`, a `time.perf_counter`, off what is left."""
        self._left_s -= time.perf_counter() - begun
        if self._left_s < 0:
            raise TimeoutError("the patterns take too long to match")

    def _of(self, expression: str) -> regex.Pattern[str]:
        if expression not in self._compiled:
            self._compiled[expression] = regex.compile(expression)
        return self._compiled[expression]


def is_plain(pattern: str) -> bool:
    """Whether `pattern` is a name, perhaps with `^` before it, in which nothing but dots is special."""
    return _PLAIN.fullmatch(pattern) is not None


def at_the_end(pattern: str) -> str:
    """The expression for `pattern` at the end of a name, after a dot or as the whole."""
    return rf"(?:.*\.)?(?:{pattern})"


class PatternTable:
    """A `rank_pattern` or `alpha_pattern`: a value for the names that end in a pattern, first come."""

    def __init__(self, values: Mapping[str, float], matcher: Matcher) -> None:
        self._values = list(values.values())
        self._matcher = matcher
        self._expressions: list[tuple[int, str]] = []
        self._plain: dict[_Frame, dict[str, int]] = {}
        for index, pattern in enumerate(values):
            if is_plain(pattern):
                frame, text = _framed(pattern)
                self._plain.setdefault(frame, {}).setdefault(text, index)
            else:
                self._expressions.append((index, at_the_end(pattern)))

    def value(self, name: str, default: float) -> float:
        """That of the first pattern that matches the end of `name` after a dot, else `default`."""
        if not self._values:
            return default
        begun = time.perf_counter()
        first = self._first_plain(name)
        self._matcher.charge(begun)
        for index, expression in self._expressions:
            if index > first:
                break
            if self._matcher.fullmatch(expression, name):
                first = index
        return default if first == len(self._values) else self._values[first]

    def _first_plain(self, name: str) -> int:
        first = len(self._values)
        for frame, patterns in self._plain.items():
            start = len(name) - frame.length
            if start < 0 or (start > 0 and (frame.is_whole or name[start - 1] != ".")):
                continue
            end = name[start:]
            if any(end[at] != "." for at in frame.dots):
                end = "".join("." if at in frame.dots else sign for at, sign in enumerate(end))
            first = min(first, patterns.get(end, first))
        return first


class _Frame(NamedTuple):
    """What names have in common that are looked up in one step."""

    length: int
    dots: tuple[int, ...]
    """Where any character will do, which is what a dot means."""
    is_whole: bool


def _framed(pattern: str) -> tuple[_Frame, str]:
    """Of a plain pattern."""
    signs = _SIGNS.findall(pattern.removeprefix("^"))
    dots = tuple(at for at, sign in enumerate(signs) if sign == ".")
    text = "".join(sign[-1] for sign in signs)
    return _Frame(len(text), dots, pattern.startswith("^")), text
