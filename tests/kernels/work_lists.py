"""Random work for the kernels that fold in a LoRA delta: which rows take what, and their `h`.

Whatever no row owns is NaN. All is made on the CPU, so that a seed means the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from kernel_cases import int32, make_segments, make_site, poisoned

from loramux.kernels import AFFINE, Expand, LoRASite, Segments, WorkList

Span = tuple[int, int, list[int]]
"""First row, end row, first pool rows of the members (none: base rows)."""

RANKS = [(2, 1), (5, 3), (9, 8), (18, 16), (36, 24), (64, 64)]
# Base rows between the adapters' and in front of them; rows 0 and 44 to 46 are in no chunk.
SPANS: list[Span] = [
    (1, 3, []),
    (3, 4, [2]),
    (4, 6, [5, 18]),
    (6, 25, [9]),
    (25, 28, [64, 36, 2]),
    (28, 44, []),
]
TOKENS = 47


@dataclass(frozen=True)
class Case:
    """One step's work on one layer, said in each of the forms the ops take."""

    site: LoRASite
    segments: Segments
    work: WorkList
    expand: Expand
    width: int
    """Columns of `h` a slice needs."""

    touched: torch.Tensor
    """[T] bool: rows in a chunk."""


def bits(value: float) -> int:
    """Of a float32."""
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


def make_work(
    spans: list[Span], columns: dict[int, int], ranks: dict[int, int], rows_per_chunk: int
) -> WorkList:
    """The chunks of `spans`, base rows first; `columns` and `ranks`, with their flag, by first pool row.
    Lists have spare room."""
    offsets, rows, scales = [0], [], []
    for _, _, members in spans:
        rows += members
        scales += [0.5 + torch.rand(()).item() for _ in members]
        offsets.append(len(rows))
    chunks = [
        [first, min(first + rows_per_chunk, end), offsets[i], offsets[i + 1]]
        for i, (start, end, _) in enumerate(spans)
        for first in range(start, end, rows_per_chunk)
    ]
    chunks.sort(key=lambda chunk: chunk[3] > chunk[2])
    bare = sum(chunk[2] == chunk[3] for chunk in chunks)
    for chunk in chunks:
        p = rows[chunk[2]] if chunk[2] < chunk[3] else None
        first = [0] * 4 if p is None else [p, columns[p], bits(scales[chunk[2]]), ranks[p]]
        chunk += first
    # Acted upon, these would not go unnoticed; those within `max_chunks` have no rows.
    spare = [[0, rows, 0, 2**30, 2**30, 2**30, bits(1.0), 2**30] for rows in (0, 0, 2**30)]
    return WorkList(
        chunks=int32([*chunks, *spare]),
        counts=int32([bare, len(chunks)]),
        member_rows=int32([*rows, 2**30]),
        member_columns=int32([*(columns[p] for p in rows), 2**30]),
        member_scales=torch.tensor([*scales, float("nan")]),
        member_ranks=int32([*(ranks[p] for p in rows), 2**30]),
        rows_per_chunk=rows_per_chunk,
        max_chunks=len(chunks) + 2,
        affine=any(r >= AFFINE for r in ranks.values()),
        max_ranks=max((r % AFFINE for r in ranks.values()), default=0),
    )


def make_h(
    site: LoRASite, work: WorkList, tokens: int, parts: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """[P, T, S * width], a view of wider rows. Its sums are exact in float32, in any order."""
    slices = site.num_slices
    wide = poisoned(parts, tokens, slices * width + 16, dtype=dtype)
    h = wide[..., 16:]
    for first, end, start, stop, *_ in work.chunks[: int(work.counts[1])].tolist():
        for m in range(start, stop):
            p, column = int(work.member_rows[m]), int(work.member_columns[m])
            for s in range(slices):
                r = int(site.row_r[s, p])
                own = slice(column * slices + s, (column + r) * slices, slices)
                values = torch.randn(parts, end - first, r)  # [P, t, r]
                h[:, first:end, own] = ((values * 512).round() / 512).to(dtype)
    return h


def affine_of(adapters: list[tuple[int, int]]) -> list[int]:
    """First pool rows of the adapters that have gains and shifts: every second one."""
    return [p for p, _ in adapters[1::2]]


def make_affine(site: LoRASite, adapters: list[tuple[int, int]]) -> torch.Tensor:
    """[2, R, N], NaN where no adapter has any."""
    affine = torch.full((2, *site.b.shape), float("nan"))
    for p in affine_of(adapters):
        affine[:, p] = torch.randn(2, site.b.shape[1]) / 4
    return affine.to(site.b.dtype)


def make_case(
    slice_starts: tuple[int, ...],
    adapters: list[tuple[int, int]],
    spans: list[Span],
    tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    h_dtype: torch.dtype = torch.float32,
    parts: int = 1,
    rows_per_chunk: int = 16,
    untouched: tuple[tuple[int, int], ...] = (),
    features: int = 1,
    under: bool = False,
) -> Case:
    """`adapters` are (first pool row, rank), `untouched` (slice, first pool row). `under`: the A
    matrices stand where they would under a base weight, and so do the columns of `h`."""
    site = make_site(slice_starts, features, adapters, dtype, untouched)
    site = replace(site, affine=make_affine(site, adapters), place_rows=1)
    ranks = {p: r + (AFFINE if p in affine_of(adapters) else 0) for p, r in adapters}
    if under:
        stacked = site.a.transpose(0, 1).contiguous()  # [R, S, in]
        site = replace(site, a=stacked.transpose(0, 1))
        columns, width = {p: p for p, _ in adapters}, site.a.shape[1]
    else:
        columns, width = {}, 2
        for p, r in reversed(adapters):
            columns[p] = width
            width += r + 1
    work = make_work(spans, columns, ranks, rows_per_chunk)
    h = make_h(site, work, tokens, parts, width, h_dtype)
    touched = torch.zeros(tokens, dtype=torch.bool)
    for start, end, _ in spans:
        touched[start:end] = True
    segments = replace(
        make_segments(spans),
        member_scales=work.member_scales[:-1],
        affine_rows=frozenset(affine_of(adapters)),
    )
    return Case(site, segments, work, Expand(site, h, work), width, touched)


def site_to(site: LoRASite, device: str) -> LoRASite:
    # `to` keeps the strides of `a`, and so the layout under a base weight.
    return LoRASite(
        site.a.to(device),
        site.b.to(device),
        site.slice_starts,
        site.row_r.to(device),
        site.row_scale.to(device),
        site.experts,
        site.affine.to(device),
        site.place_rows,
    )


def work_to(work: WorkList, device: str) -> WorkList:
    return replace(
        work,
        chunks=work.chunks.to(device),
        counts=work.counts.to(device),
        member_rows=work.member_rows.to(device),
        member_columns=work.member_columns.to(device),
        member_scales=work.member_scales.to(device),
        member_ranks=work.member_ranks.to(device),
        row_chunks=None if work.row_chunks is None else work.row_chunks.to(device),
    )


def expand_to(expand: Expand, device: str) -> Expand:
    return Expand(
        site_to(expand.site, device), strided_to(expand.h, device), work_to(expand.work, device)
    )


def strided_to(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """`tensor` [..., N] on `device`, still a view into wider rows of NaN."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 16), float("nan")).to(device)
    return wide[..., 16:].copy_(tensor)


def in_float64(expand: Expand) -> Expand:
    """For the twins: the same delta in float64, `h` summed and rounded as its text says."""
    site = expand.site
    h = expand.h.float().sum(0, keepdim=True).to(site.b.dtype)  # [1, T, W]
    wide = replace(
        site,
        a=site.a.double(),
        b=site.b.double(),
        affine=site.affine.double(),
        row_scale=site.row_scale.nan_to_num(),
    )
    return Expand(wide, h.double(), expand.work)


def for_twins(expand: Expand) -> Expand:
    """The same delta for the twins, which multiply scales of slices that are left alone."""
    return Expand(
        replace(expand.site, row_scale=expand.site.row_scale.nan_to_num()), expand.h, expand.work
    )


def moved(case: Case) -> Case:
    """`case` in a pool of two experts, every second chunk with members in the second one's rows.

    The second expert has no LoRA where slice 0 of the pool's first adapter is."""
    site, chunks = case.site, case.work.chunks.clone()
    bare, used = case.work.counts.tolist()
    chunks[bare + 1 : used : 2, 4] += site.a.shape[1]
    other_r = site.row_r.clone()
    other_r[0, int(other_r[0].nonzero()[0])] = 0
    both = LoRASite(
        torch.cat((site.a, site.a * torch.randn(site.a.shape).to(site.a.dtype)), 1),
        torch.cat((site.b, site.b * torch.randn(site.b.shape).to(site.b.dtype))),
        site.slice_starts,
        torch.cat((site.row_r, other_r), 1),
        torch.cat((site.row_scale, site.row_scale * 2), 1),
        experts=2,
        affine=torch.zeros_like(site.affine[:, :1]),  # experts have no gains
    )
    work = replace(case.work, chunks=chunks)
    return replace(case, site=both, work=work, expand=Expand(both, case.expand.h, work))


def with_own_members(work: WorkList) -> WorkList:
    """The same work with a list of members for each chunk, so that none is moved."""
    chunks = work.chunks.clone()
    members: list[int] = []
    rows: list[int] = []
    for chunk in chunks[: int(work.counts[1])]:
        start, stop, p = chunk[2:5].tolist()
        chunk[2], chunk[3] = len(members), len(members) + stop - start
        members += range(start, stop)
        rows += [p + int(work.member_rows[m] - work.member_rows[start]) for m in range(start, stop)]
    return replace(
        work,
        chunks=chunks,
        member_rows=int32(rows),
        member_columns=work.member_columns[members],
        member_scales=work.member_scales[members],
        member_ranks=work.member_ranks[members],
    )
