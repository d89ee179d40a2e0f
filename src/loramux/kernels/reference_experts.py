"""The definition of correct for the experts of a layer, in plain torch, on any device.

`route` asks nothing back from a GPU, so it may be captured: it serves there too, for many pairs.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch.nn import functional as F

from loramux.kernels.arguments import Routing, WorkList

FEW_PAIRS = 4096
"""Up to so many pairs of token and expert, an expert has few rows and chunks are small."""

SMALL_CHUNK, LARGE_CHUNK = 8, 64


def chunk_rows(pairs: int) -> int:
    """Rows of the largest chunk of a routing of so many pairs."""
    return SMALL_CHUNK if pairs <= FEW_PAIRS else LARGE_CHUNK


def most_chunks(pairs: int, num_experts: int, work: WorkList) -> int:
    """No routing has more chunks than this, whatever the experts chosen and the adapters."""
    compositions = min(work.max_chunks, work.member_rows.shape[0]) + 1
    groups = min(pairs, num_experts * compositions)
    rows = chunk_rows(pairs)
    # A group of n rows has at most (n + rows - 1) / rows chunks.
    return (pairs + groups * (rows - 1)) // rows


def compositions(work: WorkList) -> int:
    """Numbers that a token's composition may have: its first member + 1, or 0 for the base model."""
    return work.member_rows.shape[0] + 1


def route(
    chosen: torch.Tensor, num_experts: int, work: WorkList | None, rows_per_expert: int
) -> Routing:
    """The pairs of `chosen` [T, K] by expert, composition and number, and their chunks."""
    tokens, top_k = chosen.shape
    device, count = chosen.device, tokens * top_k
    radix, keys = 1, chosen.long()  # [T, K]
    if work is not None:
        radix, marks = compositions(work), _marks(work, tokens)
        keys = keys * radix + marks[:, :1]  # [T, K]
    keys, order = keys.flatten().sort(stable=True)  # [S], [S]
    places = torch.empty_like(order)  # [S]
    places[order] = torch.arange(count, device=device)  # [S]
    bounds = torch.arange(1, num_experts + 1, device=device) * radix  # [E]
    ends = torch.searchsorted(keys, bounds, out_int32=True)  # [E]
    sorted_work = None
    if work is not None:
        stops = marks[order // top_k, 1]  # [S]
        most = most_chunks(count, num_experts, work)
        sorted_work = _chunks(work, keys, stops, radix, rows_per_expert, most)
    return Routing(order.int(), places.int(), ends, sorted_work)


def _marks(work: WorkList, tokens: int) -> torch.Tensor:
    """Of each token its first member + 1 and its end member, zeros for the base model -> [T, 2]."""
    chunks = work.chunks[: work.max_chunks].long()  # [C, 8]
    used = torch.arange(len(chunks), device=chunks.device) < work.counts[1]  # [C]
    live = used & (chunks[:, 2] < chunks[:, 3])  # [C]
    values = torch.stack((chunks[:, 2] + 1, chunks[:, 3]), 1)  # [C, 2]
    values = torch.where(live[:, None], values, 0)  # [C, 2]
    # What a chunk's first row gets and the one behind its last row loses, summed along the rows.
    marks = chunks.new_zeros(tokens + 1, 2)  # [T + 1, 2]
    marks.index_add_(0, torch.where(live, chunks[:, 0], tokens), values)
    marks.index_add_(0, torch.where(live, chunks[:, 1], tokens), -values)
    return marks.cumsum(0)[:tokens]  # [T, 2]


def _chunks(
    work: WorkList,
    keys: torch.Tensor,
    stops: torch.Tensor,
    radix: int,
    rows_per_expert: int,
    most: int,
) -> WorkList:
    """The work list of rows with the sorted `keys` [S] and the end members `stops` [S]."""
    count, device = keys.shape[0], keys.device
    rows = torch.arange(count, device=device)  # [S]
    new = torch.cat((torch.ones_like(keys[:1]), keys[1:] - keys[:-1])) != 0  # [S]
    begins = torch.where(new, rows, 0).cummax(0).values  # [S]
    starting = (rows - begins) % chunk_rows(count) == 0  # [S]
    index = starting.cumsum(0)  # [S], from 1
    used = index[-1]
    # A chunk ends where the next one starts, the last one with the rows; one slot is for the others.
    firsts = torch.full((most + 2,), count, device=device)  # [most + 2]
    firsts.scatter_(0, torch.where(starting, index - 1, most + 1), rows)
    live = (torch.arange(most, device=device) < used)[:, None]  # [most, 1]
    at = firsts[:most].clamp(max=count - 1)  # [most]
    expert, composition = keys[at] // radix, keys[at] % radix  # [most], [most]
    member = (composition - 1).clamp(min=0)  # [most]
    first = _members(work)[composition]  # [most, 4]
    first[:, 0] += torch.where(composition > 0, expert * rows_per_expert, 0)
    spans = torch.stack((firsts[:most], firsts[1 : most + 1], member, stops[at]), 1)  # [most, 4]
    chunks = torch.where(live, torch.cat((spans, first), 1), 0)  # [most, 8]
    return replace(
        work,
        chunks=chunks.int(),
        counts=torch.stack((torch.zeros_like(used), used)).int(),  # [2]
        rows_per_chunk=chunk_rows(count),
        max_chunks=most,
        row_chunks=(index - 1).int(),  # [S]
    )


def _members(work: WorkList) -> torch.Tensor:
    """Row, column, bits of the scale and rank of each member, zeros before them -> [M + 1, 4]."""
    scales = work.member_scales.view(torch.int32)  # [M]
    lists = (work.member_rows, work.member_columns, scales, work.member_ranks)
    return F.pad(torch.stack(lists, 1).long(), (0, 0, 1, 0))  # [M + 1, 4]


def take_rows(x: torch.Tensor, order: torch.Tensor, top_k: int) -> torch.Tensor:
    """`x` [T, H] -> [S, H], the row of the token of each pair in `order` [S]."""
    return x.index_select(0, order // top_k)  # [S, H]


def combine(y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sums [T, H] of the rows of `y` [S, H], each pair's at `places` [S]."""
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    rows = y.index_select(0, places).to(wide).view(*weights.shape, -1)  # [T, K, H]
    return (rows * weights.to(wide)[:, :, None]).sum(1).to(y.dtype)  # [T, H]


def grouped_products(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`x` [S, in] times `weight` [E, out, in] transposed, expert by expert -> [S, out]."""
    out = x.new_empty(x.shape[0], weight.shape[1])  # [S, out]
    if x.device.type == "meta":  # where only shapes count
        return out
    for expert, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        if start < end:
            torch.mm(x[start:end], weight[expert].t(), out=out[start:end])
    return out
