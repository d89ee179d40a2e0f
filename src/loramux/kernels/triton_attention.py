"""Paged attention in Triton, for whatever the attention library does not take.

One program owns one KV head of one sequence and up to `block_m` rows, a row being a pair of query
and query head: the heads that share a KV head stand side by side in the same product. Positions
stream by in tiles, softmax is online in float32. Lengths are read on the device and the grid depends
only on the number of sequences and on `max_queries`, so a captured graph serves every batch of that
shape.
"""

# Triton comes without types; its compiler takes no annotation from outside its own language.
# mypy: disable-error-code="import-untyped,untyped-decorator"
from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl

from loramux.kernels.arguments import AttentionBatch
from loramux.kernels.triton_launch import cdiv, next_power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile_scores(
    q: tl.tensor,
    keys: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.constexpr,
    upcast: tl.constexpr,
) -> tl.tensor:
    """[M, D] @ [D, N] -> [M, N] float32: capped scores, times log2(e) for `exp2`."""
    if upcast:
        q, keys = q.to(tl.float32), keys.to(tl.float32)
    scores = tl.dot(q, keys, input_precision="ieee") * scaling  # [M, N]
    if softcap > 0.0:
        # tanh, which Triton has only on the device; the exponent is never positive.
        small = tl.exp2(tl.abs(scores) * (-2.0 * LOG2_E / softcap))  # [M, N]
        size = softcap * (1.0 - small) / (1.0 + small)  # [M, N]
        scores = tl.where(scores < 0.0, -size, size)  # [M, N]
    return scores * LOG2_E


@triton.jit
def _with_sinks(
    total: tl.tensor,
    top: tl.tensor,
    sinks_ptr: tl.tensor,
    q_head: tl.tensor,
    sunk: tl.constexpr,
) -> tl.tensor:
    """The sums [M] of rows whose highest scores are `top`, with the sinks of their heads if `sunk`."""
    if sunk:
        base = tl.where(top == float("-inf"), 0.0, top)  # [M] where a row has seen nothing
        total += tl.exp2(tl.load(sinks_ptr + q_head) * LOG2_E - base)  # [M]
    return total


@triton.jit
def _reach(
    own: tl.tensor,
    end: tl.tensor,
    context: tl.tensor,
    exists: tl.tensor,
    last_keys_at: tl.tensor,
    ahead: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The last position [M] that each row sees, and where the keys end that any of them sees: `own` [M]
    and `end`, but with `ahead` what `last_keys` says as well."""
    last = own  # [M]
    if ahead:
        last = tl.maximum(own, tl.load(last_keys_at, mask=exists, other=-1))  # [M]
        furthest = tl.max(tl.where(exists, last, 0), 0)
        end = tl.minimum(furthest + 1, context)
    return last, end


@triton.jit
def _attention_kernel(
    out_ptr: tl.tensor, q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor,
    tables_ptr: tl.tensor, starts_ptr: tl.tensor, contexts_ptr: tl.tensor, scaling: tl.tensor,
    q_stride_t: tl.tensor, q_stride_h: tl.tensor, k_stride_b: tl.tensor, k_stride_s: tl.tensor,
    k_stride_h: tl.tensor, v_stride_b: tl.tensor, v_stride_s: tl.tensor, v_stride_h: tl.tensor,
    tables_stride: tl.tensor, sinks_ptr: tl.tensor, last_keys_ptr: tl.tensor, ahead: tl.constexpr,
    window: tl.constexpr, softcap: tl.constexpr, block_size: tl.constexpr, group: tl.constexpr,
    dim: tl.constexpr, dim_v: tl.constexpr, block_d: tl.constexpr, block_dv: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, sunk: tl.constexpr, upcast: tl.constexpr,
) -> None:  # fmt: skip
    """Grid [row blocks, Hkv, Q]; `block_d`, `block_dv`: `dim`, `dim_v` rounded up for `tl.dot`."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    start = tl.load(starts_ptr + sequence)
    queries = tl.load(starts_ptr + sequence + 1) - start
    row = tl.program_id(0) * block_m
    if row >= queries * group:
        return
    before = tl.load(contexts_ptr + sequence) - queries  # positions in front of the first query

    rows = row + tl.arange(0, block_m)  # [M]
    exists = rows < queries * group  # [M]
    query = rows // group  # [M]
    token, q_head = (start + query).to(tl.int64), head * group + rows % group  # [M]
    own = before + query  # [M] the position of each row
    features, features_v = tl.arange(0, block_d), tl.arange(0, block_dv)  # [D], [Dv]
    q_at = (token * q_stride_t + q_head * q_stride_h)[:, None] + features[None, :]  # [M, D]
    q = tl.load(q_ptr + q_at, mask=exists[:, None] & (features < dim)[None, :], other=0.0)

    # Nobody in this block looks outside [first, end): what lies there is not read.
    first, end = 0, before + tl.minimum((row + block_m - 1) // group + 1, queries)
    last, end = _reach(own, end, before + queries, exists, last_keys_ptr + token, ahead)  # [M]
    if window > 0:
        first = tl.maximum(before + row // group - window + 1, 0)
    top = tl.full([block_m], float("-inf"), tl.float32)  # [M]
    total = tl.zeros([block_m], tl.float32)  # [M]
    acc = tl.zeros([block_m, block_dv], tl.float32)  # [M, Dv]
    for tile in range(first // block_n * block_n, end, block_n):
        positions = tile + tl.arange(0, block_n)  # [N]
        wanted = (positions >= first) & (positions < end)  # [N]
        entry = tables_ptr + sequence.to(tl.int64) * tables_stride + positions // block_size
        block = tl.load(entry, mask=wanted, other=0).to(tl.int64)  # [N]
        slot = positions % block_size  # [N]
        k_at = block * k_stride_b + slot * k_stride_s + head * k_stride_h  # [N]
        v_at = block * v_stride_b + slot * v_stride_s + head * v_stride_h  # [N]
        k_mask = wanted[None, :] & (features < dim)[:, None]  # [D, N]
        keys = tl.load(k_ptr + k_at[None, :] + features[:, None], mask=k_mask, other=0.0)
        scores = _tile_scores(q, keys, scaling, softcap, upcast)  # [M, N]
        seen = positions[None, :] <= last[:, None]  # [M, N]
        if window > 0:
            seen = seen & (positions[None, :] > own[:, None] - window)  # [M, N]
        scores = tl.where(seen & wanted[None, :], scores, float("-inf"))  # [M, N]

        higher = tl.maximum(top, tl.max(scores, 1))  # [M]
        # A row that has seen nothing yet has -inf here, and -inf - -inf would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)  # [M]
        weights, fade = tl.exp2(scores - base[:, None]), tl.exp2(top - base)  # [M, N], [M]
        top, total = higher, total * fade + tl.sum(weights, 1)  # [M]
        v_mask = wanted[:, None] & (features_v < dim_v)[None, :]  # [N, Dv]
        values = tl.load(v_ptr + v_at[:, None] + features_v[None, :], mask=v_mask, other=0.0)
        if upcast:
            values = values.to(tl.float32)  # [N, Dv]
        acc = acc * fade[:, None]  # [M, Dv]
        acc += tl.dot(weights.to(values.dtype), values, input_precision="ieee")  # [M, Dv]

    total = _with_sinks(total, top, sinks_ptr, q_head, sunk)  # [M]
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]  # [M, Dv]
    heads = tl.num_programs(1) * group
    out_at = ((token * heads + q_head) * dim_v)[:, None] + features_v[None, :]  # [M, Dv]
    out_mask = exists[:, None] & (features_v < dim_v)[None, :]  # [M, Dv]
    tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


def _tiles(rows: int, block_d: int, dtype: torch.dtype) -> tuple[int, int]:
    """(block_m, block_n) for `rows` rows a program may take and features of width `block_d`.

    A float32 product runs without tensor cores and keeps its operands in registers: small tiles."""
    narrow = dtype.itemsize == 2
    largest = 64 if narrow and block_d <= 256 else 32 if block_d <= 64 else 16
    width = block_d * dtype.itemsize
    block_n = 64 if width <= 256 else 32 if width <= 512 else 16
    return min(largest, max(16, next_power_of_2(rows))), block_n


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`q` [T, H, D] over the caches [num_blocks, block_size, Hkv, D or Dv] -> [T, H, Dv].

    Rows that no sequence owns, or whose sequence has no context, come out zero.
    """
    tokens, heads, dim = q.shape
    block_size, kv_heads, dim_v = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    out = q.new_zeros(tokens, heads, dim_v)  # [T, H, Dv]
    sequences, starts = batch.block_tables.shape[0], batch.query_starts
    longest = batch.max_queries or max((end - start for start, end in pairwise(starts)), default=0)
    if not longest:
        return out
    q, k_cache, v_cache = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (q, k_cache, v_cache)
    )
    group = heads // kv_heads
    block_d, block_dv = (max(16, next_power_of_2(size)) for size in (dim, dim_v))
    block_m, block_n = _tiles(longest * group, max(block_d, block_dv), q.dtype)
    grid = (cdiv(longest * group, block_m), kv_heads, sequences)
    _attention_kernel[grid](
        out, q, k_cache, v_cache,
        batch.block_tables, batch.query_starts_tensor, batch.context_lens_tensor,
        scaling, q.stride(0), q.stride(1),
        *k_cache.stride()[:3], *v_cache.stride()[:3], batch.block_tables.stride(0),
        *(q if tensor is None else tensor for tensor in (sinks, batch.last_keys)),
        window=window, softcap=softcap, block_size=block_size, group=group,
        dim=dim, dim_v=dim_v, block_d=block_d, block_dv=block_dv,
        block_m=block_m, block_n=block_n, sunk=sinks is not None,
        ahead=batch.last_keys is not None,
        # The interpreter multiplies the bits of bf16 as if they were integers.
        upcast=triton.knobs.runtime.interpret,
        num_warps=8 if block_m * block_dv >= 64 * 256 else 4, num_stages=2,
    )  # fmt: skip
    return out
