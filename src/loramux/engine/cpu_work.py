"""The adapters of a CPU step as a `WorkList`, for layers whose adapters are sharded in both factors.

Elsewhere the CPU's kernels take `Segments`, and shrink and expand in one call; here a collective
comes between the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch

from loramux.engine.plan import Row
from loramux.kernels import AFFINE, WorkList
from loramux.layers.batch import LoRAStep
from loramux.layers.sharded import deal_out, parted


def lora_step(
    rows: Sequence[Row], rank_rows: Mapping[int, int], affine_rows: Set[int], deal: int
) -> LoRAStep | None:
    """The step's adapters, a chunk for each part of `rows` that has any; None where none has.

    `rank_rows` maps an adapter's first pool row to its rank rows, `affine_rows` has those of adapters
    with gains and shifts; pool rows are multiples of `deal`, and so are the columns in which a member's
    activations stand."""
    chunks: list[list[int]] = []
    members: list[tuple[int, int, float, int]] = []  # row, column, scale, rank rows
    width = token = 0
    for count, own in (part for row in rows for part in row.parts()):
        end = token + count
        if own:
            first, column = len(members), 0
            for place, scale in own:
                r = rank_rows[place]
                members.append((place, column, scale, r + (AFFINE if place in affine_rows else 0)))
                column += r + -r % deal
            width = max(width, column)
            chunks.append([token, end, first, len(members), *_first(members[first])])
        token = end
    if not chunks:
        return None
    places, columns, scales, ranks = zip(*members, strict=True)
    work = WorkList(
        chunks=torch.tensor(chunks, dtype=torch.int32),  # [C, 8]
        counts=torch.tensor([0, len(chunks)], dtype=torch.int32),  # [2]
        member_rows=torch.tensor(places, dtype=torch.int32),  # [M]
        member_columns=torch.tensor(columns, dtype=torch.int32),  # [M]
        member_scales=torch.tensor(scales, dtype=torch.float32),  # [M]
        member_ranks=torch.tensor(ranks, dtype=torch.int32),  # [M]
        rows_per_chunk=64,
        max_chunks=len(chunks),
        affine=any(r >= AFFINE for r in ranks),
    )
    deltas, affine = parted(work)
    return LoRAStep(work, 0, width, dealt=deal_out(work, deal), deltas=deltas, affine=affine)


def _first(member: tuple[int, int, float, int]) -> tuple[int, int, int, int]:
    """A chunk's first member as its line has it."""
    place, column, scale, r = member
    return place, column, int(torch.tensor(scale).view(torch.int32)), r
