"""From which token on the adapters of a sequence apply. Torch-free.

PEFT adds the LoRA of an activated adapter to the tokens from the last occurrence of its invocation in
the prompt on, and to every token after the prompt; where the prompt has no occurrence, to none.

    prompt     q q q q q [invocation] q q | answer
    members    (base)    (a)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import repeat

from loramux.types import AdapterRef, Composition, MediaItem, Request, compose

Members = tuple[tuple[int, float], ...]


def start_of(invocation: Sequence[int], prompt: Sequence[int]) -> int | None:
    """The first token of the last occurrence of `invocation` in `prompt`; 0 where it is empty."""
    if not invocation:
        return 0
    # Searched as text, from its end: a search for text takes linear time whatever is sought.
    letters = {token: chr(i) for i, token in enumerate(dict.fromkeys(invocation), 1)}
    text = "".join(map(letters.get, reversed(prompt), repeat("\0")))
    found = text.find("".join(letters[token] for token in reversed(invocation)))
    return None if found < 0 else len(prompt) - found - len(invocation)


def starts_of(adapters: Sequence[AdapterRef], prompt: Sequence[int]) -> tuple[int | None, ...]:
    """`start_of` for each; () where none is an activated LoRA."""
    if not any(ref.invocation for ref in adapters):
        return ()
    return tuple(start_of(ref.invocation, prompt) for ref in adapters)


def not_invoked(adapters: Sequence[AdapterRef], prompt: Sequence[int]) -> list[AdapterRef]:
    """Those that do not apply to `prompt` nor to its answer."""
    starts = starts_of(adapters, prompt)
    return [ref for ref, start in zip(adapters, starts, strict=False) if start is None]


def inside_media(
    starts: Sequence[int | None], items: Sequence[MediaItem]
) -> tuple[int, MediaItem] | None:
    """The number of an adapter that begins to apply amid the vectors of an item, and the item."""
    for number, start in enumerate(starts):
        for item in items if start else ():
            if any(a <= start < b for a, b in item.spans):  # type: ignore[operator]
                return number, item
    return None


def composed(request: Request) -> tuple[Composition, tuple[int, ...]]:
    """(the adapters that apply to `request`, those that begin first in front; where each begins)."""
    begins = {
        ref.digest: start
        for (ref, _), start in zip(
            request.adapters, request.starts or repeat(0, len(request.adapters)), strict=True
        )
        if start is not None
    }
    applying = compose(
        [(ref.digest, scale) for ref, scale in request.adapters if ref.digest in begins],
        # One that scales outputs scales the deltas before it as well.
        in_turn=any(ref.affine for ref, _ in request.adapters),
    )
    ordered = sorted(applying, key=lambda member: begins[member[0]])
    return tuple(ordered), tuple(begins[digest] for digest, _ in ordered)


def until_second(starts: Sequence[int], start: int, count: int) -> int:
    """How many of the `count` tokens from `start` on may be one row: it passes one beginning at most, so
    that the lists of a step have a bound."""
    later = [begin for begin in starts if begin > start]
    second = next((begin for begin in later if begin > later[0]), None)
    return count if second is None else min(count, second - start)


def members_of_row(
    members: Members, starts: Sequence[int], start: int, end: int
) -> tuple[Members, tuple[int, Members] | None]:
    """(the members of the last tokens of [start, end), and, where they are not those of all, how many
    tokens come before and their members). One begins within at most."""
    last = members[: bisect_left(starts, end)]
    first = members[: bisect_left(starts, start + 1)]
    if first == last:
        return last, None
    return last, (starts[len(first)] - start, first)
