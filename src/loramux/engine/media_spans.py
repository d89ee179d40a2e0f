"""Where the vectors of media stand among the tokens of a sequence. Torch-free.

tokens    a  b  <  <  <  c  <  <  d        < is a placeholder
item           [2 .. 5)    [6 .. 8)        spans, in order
vectors         0  1  2     3  4
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loramux.types import MediaItem


def items_between(items: Sequence[MediaItem], start: int, stop: int) -> list[MediaItem]:
    """Items that have vectors at tokens [start, stop)."""
    return [item for item in items if any(a < stop and start < b for a, b in item.spans)]


def vectors_between(item: MediaItem, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(first token, first vector, count) of each run of vectors that stands in tokens [start, stop)."""
    before = 0
    for a, b in item.spans:
        first, last = max(a, start), min(b, stop)
        if first < last:
            yield first, before + first - a, last - first
        before += b - a


def content_key(items: Sequence[MediaItem], start: int, stop: int) -> bytes:
    """What tells tokens [start, stop) from the same tokens with other media; empty without media."""
    parts = [
        f"{item.digest}:{vector}:{token - start}:{count};"
        for item in items
        for token, vector, count in vectors_between(item, start, stop)
    ]
    return "".join(parts).encode()


def whole_until(items: Sequence[MediaItem], start: int, stop: int) -> int:
    """The last place up to `stop` where tokens from `start` on may be cut without cutting a span."""
    cuts = [a for item in items for a, b in item.spans if a < stop < b]
    return max(start, min(cuts, default=stop))


def in_order(items: Sequence[MediaItem]) -> tuple[MediaItem, ...]:
    """By their first token."""
    return tuple(sorted(items, key=lambda item: item.spans[0][0] if item.spans else 0))
