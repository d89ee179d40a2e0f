"""Small steps with prompts in them, as steps that the graph of a decode serves.

    prompt  a b c at 0        a: 1 position    b: 2 positions    c: 3 positions
    decode  d at 40     ──>   d: 41 positions

A captured step has a sequence for each token. A token of a prompt can be one: keys and values of all
tokens of a step are written before a layer's attention reads any, and a token attends to the
positions up to its own. What that costs is reading a prompt's positions once a token, so it is for
short prompts and for the ends of long ones, whose steps would otherwise take as long as launching
hundreds of kernels does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loramux.config.graphs import REREAD_BYTES, REREAD_POSITIONS
from loramux.engine.plan import Row

LONGEST_WHOLE = 8192  # positions that one program may read alone without holding up a step


@dataclass(frozen=True, slots=True)
class Limits:
    """What a captured step may be."""

    tokens: int
    positions: int
    """That the tokens of prompts attend to, each token's counted on its own."""

    cut: int
    """Tokens up to which attention cuts the work of one token among many programs. In larger steps
    a token that attends to more than `LONGEST_WHOLE` positions would be waited for."""

    @classmethod
    def of(cls, sizes: Sequence[int], sequences: int, kv_bytes_per_token: int) -> Limits:
        """For the captured `sizes`, where attention cuts the work of up to `sequences` tokens."""
        positions = min(REREAD_POSITIONS, REREAD_BYTES // kv_bytes_per_token)
        cut = max((size for size in sizes if size <= sequences), default=0)
        return cls(max(sizes, default=0), positions, cut)


def single_tokens(rows: Sequence[Row], block_size: int, limits: Limits) -> Sequence[Row] | None:
    """`rows` with a row for each token, in the same order; the last one of a prompt samples for it.

    None where that would be beyond the limits, and where media stand in a row."""
    counts = [len(row.token_ids) for row in rows]
    if any(row.media is not None for row in rows):
        return None  # no graph takes vectors, or positions other than a token's own
    if sum(counts) > limits.tokens:
        return None
    if sum(counts) > limits.cut and any(row.start >= LONGEST_WHOLE for row in rows):
        return None
    if max(counts, default=0) <= 1:
        return rows
    long = [row for row in rows if len(row.token_ids) > 1]
    if sum(_positions(row) for row in long) > limits.positions:
        return None
    return [single for row in rows for single in _cut(row, block_size)]


def _positions(row: Row) -> int:
    """Positions that the row's tokens attend to, each token's counted on its own."""
    count = len(row.token_ids)
    return count * row.start + count * (count + 1) // 2


def _cut(row: Row, block_size: int) -> list[Row]:
    last = len(row.token_ids) - 1
    if not last:
        return [row]
    cut, early = row.before or (0, ())
    return [
        Row(
            row.sequence_id,
            (token,),
            row.start + place,
            row.block_table[: (row.start + place) // block_size + 1],
            row.members if place >= cut else early,
            row.sample if place == last else None,
            row.shift,
        )
        for place, token in enumerate(row.token_ids)
    ]
