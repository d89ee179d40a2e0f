"""Random arguments for the ops, poisoned where nobody may look, and a float64 answer to each.

The oracles are written from the ops' text, not from `reference.py`: dense weights, plain loops.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from loramux.kernels import AttentionBatch, LoRASite, Segments

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One rounding to nearest, relative; float32 leaves room for the order of a sum.
STEP = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
NAN = float("nan")


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, NAN, dtype=dtype)


def strided(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random values, last dim contiguous, NaN in the gaps between the rows."""
    wide = poisoned(*shape[:-1], shape[-1] + 5, dtype=dtype)
    view = wide[..., 3 : 3 + shape[-1]]
    return view.copy_(torch.randn(shape))


def assert_close(
    actual: torch.Tensor, wanted: torch.Tensor, steps: float = 1.0, floor: float = 4e-6
) -> None:
    """`actual` is `wanted` (float64) up to `steps` roundings; `floor` is for sums in float32."""
    allowed = wanted.abs() * STEP[actual.dtype] * steps + floor
    worst = ((actual.double() - wanted).abs() / allowed).max().item() if wanted.numel() else 0.0
    assert worst <= 1.0, f"{actual.dtype}: off by {worst:.2f} times the allowed error"


def make_site(
    slice_starts: tuple[int, ...],
    features: int,
    adapters: list[tuple[int, int]],
    dtype: torch.dtype,
    untouched: tuple[tuple[int, int], ...] = (),
) -> LoRASite:
    """A pool with `adapters` (first row, rank); `untouched`: pairs (slice, first row)."""
    slices, rows = len(slice_starts) - 1, 3 + max(p + r for p, r in adapters)
    a = poisoned(slices, rows, features, dtype=dtype)
    b = poisoned(rows, slice_starts[-1], dtype=dtype)
    row_r, row_scale = (
        torch.zeros(slices, rows, dtype=torch.int32),
        poisoned(slices, rows, dtype=torch.float32),
    )
    for p, r in adapters:
        for s in range(slices):
            if (s, p) in untouched:
                continue
            lo, hi = slice_starts[s], slice_starts[s + 1]
            a[s, p : p + r] = torch.randn(r, features) / math.sqrt(features)
            b[p : p + r, lo:hi] = torch.randn(r, hi - lo) / math.sqrt(r)
            row_r[s, p], row_scale[s, p] = r, 0.5 + torch.rand(()).item()
    return LoRASite(a, b, slice_starts, row_r, row_scale)


def make_segments(spans: list[tuple[int, int, list[int]]]) -> Segments:
    """Spans of (start, end, first rows of the members), with random scales."""
    offsets, members = [0], []
    for _, _, rows in spans:
        members += rows
        offsets.append(len(members))
    return Segments(
        int32([start for start, _, _ in spans]),
        int32([end for _, end, _ in spans]),
        int32(offsets),
        int32(members),
        torch.rand(len(members)) + 0.5,
        len(spans),
    )


def lora_oracle(
    y: torch.Tensor, x: torch.Tensor, site: LoRASite, segments: Segments
) -> torch.Tensor:
    """float64 [T, N]: y + x @ W^T with the dense W of each member, and then what it does to the sum."""
    wanted = y.double().clone()
    for g in range(segments.num_segments):
        span = slice(int(segments.starts[g]), int(segments.ends[g]))
        for m in range(int(segments.member_offsets[g]), int(segments.member_offsets[g + 1])):
            p, scale = int(segments.member_rows[m]), segments.member_scales[m].double()
            dense = torch.zeros(site.slice_starts[-1], x.shape[1], dtype=torch.float64)
            for s in range(site.num_slices):
                lo, hi, r = *site.slice_starts[s : s + 2], int(site.row_r[s, p])
                if r:
                    up, down = site.b[p : p + r, lo:hi].double(), site.a[s, p : p + r].double()
                    dense[lo:hi] += scale * site.row_scale[s, p].double() * (up.T @ down)
            wanted[span] += x[span].double() @ dense.T
            if p in segments.affine_rows:
                gain, shift = site.affine[:, p // site.place_rows].double()
                wanted[span] = wanted[span] * (1 + gain) + shift
    return wanted


def make_batch(
    lengths: list[tuple[int, int]], block_size: int, first_needed: list[int] | None = None
) -> tuple[AttentionBatch, int]:
    """A batch of (queries, context) with scattered blocks, and the number of blocks it needs.

    Table entries that nobody may follow are -1: behind the last block, or before `first_needed`.
    """
    counts = [(context + block_size - 1) // block_size for _, context in lengths]
    order = torch.randperm(sum(counts) + 3).to(torch.int32)
    tables = torch.full((len(lengths), max(counts) + 2), -1, dtype=torch.int32)
    used = 0
    for i, count in enumerate(counts):
        tables[i, :count] = order[used : used + count]
        used += count
        if first_needed:
            tables[i, : first_needed[i] // block_size] = -1
    starts = [0]
    for queries, _ in lengths:
        starts.append(starts[-1] + queries)
    contexts = [context for _, context in lengths]
    batch = AttentionBatch(tables, starts, contexts, int32(starts), int32(contexts))
    return batch, len(order)


def fill_cache(
    batch: AttentionBatch, blocks: int, size: int, heads: int, dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """[blocks, size, heads, dim]: random where a sequence has a position, NaN everywhere else."""
    cache = poisoned(blocks, size, heads, dim, dtype=dtype)
    for i, context in enumerate(batch.context_lens):
        positions = torch.arange(context)
        blocks_of = batch.block_tables[i][positions // size]
        here = blocks_of >= 0
        values = torch.randn(int(here.sum()), heads, dim).to(dtype)
        cache[blocks_of[here], positions[here] % size] = values
    return cache


def attention_oracle(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scaling: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """float64 [T, H, Dv], one query at a time."""
    size, group = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    wanted = torch.zeros(q.shape[0], q.shape[1], v_cache.shape[3], dtype=torch.float64)
    for i, context in enumerate(batch.context_lens):
        start, end = batch.query_starts[i : i + 2]
        for t in range(start, end):
            own = last = context - end + t
            if batch.last_keys is not None:
                last = max(own, int(batch.last_keys[t]))
            positions = torch.arange(max(0, own - window + 1) if window else 0, last + 1)
            blocks, offsets = batch.block_tables[i][positions // size], positions % size
            keys = k_cache[blocks, offsets].double().repeat_interleave(group, 1)  # [c, H, D]
            values = v_cache[blocks, offsets].double().repeat_interleave(group, 1)  # [c, H, Dv]
            scores = torch.einsum("hd,chd->hc", q[t].double(), keys) * scaling  # [H, c]
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)  # [H, c]
            # A sink's score is one of a position whose value is zero.
            if sinks is not None:
                scores = torch.cat((scores, sinks.double()[:, None]), 1)  # [H, c+1]
                values = torch.cat((values, torch.zeros_like(values[:1])))  # [c+1, H, Dv]
            wanted[t] = torch.einsum("hc,chd->hd", scores.softmax(-1), values)  # [H, Dv]
    return wanted


def with_images(batch: AttentionBatch) -> AttentionBatch:
    """Some rows of each sequence are an image's, which see all of it; of the others `last_keys` says
    -1 or some position up to their own."""
    last_keys = torch.full((batch.query_starts[-1],), -1, dtype=torch.int32)  # [T]
    for i, context in enumerate(batch.context_lens):
        start, end = batch.query_starts[i : i + 2]
        if start == end:
            continue
        own = torch.arange(context - (end - start), context)  # [q]
        earlier = (torch.rand(end - start) * (own + 1)).long()  # [q]
        last_keys[start:end] = torch.where(torch.rand(end - start) < 0.5, earlier, -1)
        first, last = sorted(torch.randint(end - start, (2,)).tolist())
        last_keys[start + first : start + last + 1] = own[last]
    return replace(batch, last_keys=last_keys)


def without_notes(batch: AttentionBatch) -> AttentionBatch:
    """The same batch as if no op had seen it."""
    return replace(batch, notes={})
