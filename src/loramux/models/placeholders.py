"""Where media stand in a prompt, and the tokens that they become.

A prompt has one placeholder an item. A processor writes a longer text in its place, in which one token
stands for each vector of the encoder, often with others between: tags, breaks, line ends.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loramux.types import Modality

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Expansion:
    """What one item becomes: `text`, and `token_ids`, which are those of this text alone. `vector_id` is
    the token among them that stands for a vector."""

    text: str
    token_ids: tuple[int, ...]
    vector_id: int

    @property
    def num_vectors(self) -> int:
        return self.token_ids.count(self.vector_id)


@dataclass(frozen=True, slots=True)
class Place:
    """A placeholder: characters, or tokens, [start, stop) of a prompt."""

    modality: Modality
    start: int
    stop: int


class Placeholders:
    """`texts` and `ids` are the placeholders by modality; one without an id is no token, but text."""

    def __init__(self, texts: Mapping[Modality, str], ids: Mapping[Modality, int]):
        self.texts = dict(texts)
        self._by_id = {token: modality for modality, token in ids.items()}
        named = [f"(?P<{modality}>{re.escape(text)})" for modality, text in texts.items()]
        self._pattern = re.compile("|".join(named) or r"(?!)")

    def find(self, prompt: str | Sequence[int]) -> list[Place]:
        return list(self._in_text(prompt) if isinstance(prompt, str) else self._in_ids(prompt))

    def _in_text(self, prompt: str) -> Iterator[Place]:
        for match in self._pattern.finditer(prompt):
            modality: Modality = match.lastgroup  # type: ignore[assignment]
            yield Place(modality, *match.span())

    def _in_ids(self, prompt: Sequence[int]) -> Iterator[Place]:
        for index, token in enumerate(prompt):
            if (modality := self._by_id.get(token)) is not None:
                yield Place(modality, index, index + 1)


def expanded_text(prompt: str, places: Iterable[Place], expansions: Iterable[Expansion]) -> str:
    pieces, last = [], 0
    for place, expansion in zip(places, expansions, strict=True):
        pieces += [prompt[last : place.start], expansion.text]
        last = place.stop
    return "".join([*pieces, prompt[last:]])


def expanded_ids(
    prompt: Sequence[int], places: Iterable[Place], expansions: Iterable[Expansion]
) -> list[int]:
    """Tokens around a placeholder stay as they are, also where one text would have joined them."""
    ids: list[int] = []
    last = 0
    for place, expansion in zip(places, expansions, strict=True):
        ids += [*prompt[last : place.start], *expansion.token_ids]
        last = place.stop
    return [*ids, *prompt[last:]]


def spans_of(
    token_ids: Sequence[int], expansions: Sequence[Expansion], vector_ids: Iterable[int]
) -> list[tuple[Span, ...]] | None:
    """For each expansion, in the order of the prompt, the runs of tokens that stand for its vectors.

    None where the prompt has another number of such tokens than all the expansions: then some of them
    are nobody's.
    """
    tokens = np.asarray(token_ids, np.int64)  # [N]
    at = {token: np.flatnonzero(tokens == token) for token in vector_ids}
    wanted: Counter[int] = Counter()
    for expansion in expansions:
        wanted[expansion.vector_id] += expansion.num_vectors
    if any(len(places) != wanted[token] for token, places in at.items()):
        return None
    spans = []
    for expansion in expansions:
        mine, at[expansion.vector_id] = np.split(at[expansion.vector_id], [expansion.num_vectors])
        spans.append(_runs(mine))
    return spans


def _runs(places: np.ndarray) -> tuple[Span, ...]:
    """Rising integers [N] -> maximal [start, stop) of consecutive ones."""
    pieces = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
    return tuple((int(piece[0]), int(piece[-1]) + 1) for piece in pieces if len(piece))
