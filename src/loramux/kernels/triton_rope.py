"""From the merged q, k and v product to rotated queries and a written cache, on a GPU.

Arithmetic runs in float32 and rounds where the twins round.
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels.arguments import Expand, NormMode
from loramux.kernels.triton_lora import chunk_delta, chunk_of, kernel_arguments, programs, rounded
from loramux.kernels.triton_norm import normed

ROWS = 16
"""Rows of a tile where there is no delta, so no chunk that would say it."""


class Cache(NamedTuple):
    """A cache [num_blocks, block_size, Hkv, D] as a kernel takes it."""

    data: torch.Tensor
    block_stride: int
    slot_stride: int
    head_stride: int
    feature_stride: int


def _cache(tensor: torch.Tensor) -> Cache:
    return Cache(tensor, *tensor.stride())


@triton.jit
def _in_cache(cache, slots, head, BLOCK_SIZE: tl.constexpr):
    """Where a head's vectors stand, for each slot (those below 0 need a mask)."""
    slots = slots.to(tl.int64)
    at = slots // BLOCK_SIZE * cache.block_stride + slots % BLOCK_SIZE * cache.slot_stride
    return cache.data + at + head * cache.head_stride


@triton.jit
def _part(
    qkv, qkv_stride, lora, first, stop, rows, row_mask, low,
    STARTS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns low..low+SIZE-1 of `rows`, the delta added: [ROWS, BLOCK] float32, zeros behind."""
    inside = tl.arange(0, BLOCK)
    here = inside < SIZE
    columns = low + inside
    at = qkv + rows.to(tl.int64)[:, None] * qkv_stride + columns[None, :]
    value = tl.load(at, mask=row_mask[:, None] & here[None, :], other=0.0).to(tl.float32)
    if lora is not None:
        value += chunk_delta(
            lora, first, stop, rows, row_mask, low, columns, here, STARTS, PARTS, ROWS, BLOCK
        )
        value = rounded(value, qkv.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def _normed_part(
    value, inverse, weight, low, SIZE: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr,
    dtype: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    inside = tl.arange(0, BLOCK)
    factor = tl.load(weight + low + inside, mask=inside < SIZE, other=0.0)[None, :]
    return rounded(normed(value, inverse, factor, MODE, dtype), wide).to(tl.float32)


@triton.jit
def _rotated(
    low, high, table, table_stride, positions, rows, row_mask, HALF: tl.constexpr,
    BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The two halves turned; every product is rounded, as Hugging Face's code does."""
    position = tl.load(positions + rows, mask=row_mask, other=0).to(tl.int64)
    inside = tl.arange(0, BLOCK)
    at = table + position[:, None] * table_stride + inside[None, :]
    mask = row_mask[:, None] & (inside < HALF)[None, :]
    cos = rounded(tl.load(at, mask=mask, other=0.0), dtype).to(tl.float32)  # [ROWS, BLOCK]
    sin = rounded(tl.load(at + HALF, mask=mask, other=0.0), dtype).to(tl.float32)
    turned_low = rounded(low * cos, dtype).to(tl.float32)
    turned_low -= rounded(high * sin, dtype).to(tl.float32)
    turned_high = rounded(high * cos, dtype).to(tl.float32)
    turned_high += rounded(low * sin, dtype).to(tl.float32)
    return turned_low, turned_high


@triton.jit
def _store(at, stride, low, value, row_mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Features low..low+SIZE-1 of the vectors at `at` [ROWS]."""
    inside = tl.arange(0, BLOCK)
    at = at[:, None] + ((low + inside) * stride)[None, :]
    value = rounded(value, at.dtype.scalar.element_ty)
    tl.store(at, value, mask=row_mask[:, None] & (inside < SIZE)[None, :])


@triton.jit
def _store_head(
    at, stride, low, high, rest, row_mask,
    D: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    _store(at, stride, 0, low, row_mask, HALF, HALF_BLOCK)
    _store(at, stride, HALF, high, row_mask, HALF, HALF_BLOCK)
    if D > 2 * HALF:
        _store(at, stride, 2 * HALF, rest, row_mask, D - 2 * HALF, REST_BLOCK)


@triton.jit
def _turned_head(
    low, high, rest, norm, eps, table, table_stride, positions, rows, row_mask,
    D: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    MODE: tl.constexpr, dtype: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Norm (where `norm` is no None) and rotation of a head in three parts."""
    if norm is not None:
        squares = tl.sum(low * low, 1) + tl.sum(high * high, 1) + tl.sum(rest * rest, 1)
        inverse = tl.rsqrt(squares / D + eps)[:, None]
        low = _normed_part(low, inverse, norm, 0, HALF, HALF_BLOCK, MODE, dtype, wide)
        high = _normed_part(high, inverse, norm, HALF, HALF, HALF_BLOCK, MODE, dtype, wide)
        if D > 2 * HALF:
            rest = _normed_part(
                rest, inverse, norm, 2 * HALF, D - 2 * HALF, REST_BLOCK, MODE, dtype, wide
            )
    low, high = _rotated(
        low, high, table, table_stride, positions, rows, row_mask, HALF, HALF_BLOCK, wide
    )
    return low, high, rest


@triton.jit(do_not_specialize=["count"])
def _rope_kv(
    qkv, qkv_stride, table, table_stride, positions, slots, q, k_cache, v_cache, q_norm, k_norm,
    eps, count, lora, STARTS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    dtype: tl.constexpr = qkv.dtype.element_ty
    wide: tl.constexpr = q.dtype.element_ty
    if lora is None:
        end = (count + ROWS - 1) // ROWS * ALL
    else:
        end = tl.load(lora.counts + 1) * ALL
    for item in range(tl.program_id(0), end, tl.num_programs(0)):
        first_row, end_row, first, stop = item // ALL * ROWS, count, 0, 0
        if lora is not None:
            first_row, end_row, first, stop = chunk_of(lora, item // ALL)
        head = item % ALL
        rows = first_row + tl.arange(0, ROWS)
        live = rows < end_row
        low = _part(
            qkv, qkv_stride, lora, first, stop, rows, live, head * D,
            STARTS, PARTS, ROWS, HALF, HALF_BLOCK,
        )  # fmt: skip
        high = _part(
            qkv, qkv_stride, lora, first, stop, rows, live, head * D + HALF,
            STARTS, PARTS, ROWS, HALF, HALF_BLOCK,
        )  # fmt: skip
        rest = tl.zeros((ROWS, REST_BLOCK), tl.float32)
        if D > 2 * HALF:
            rest = _part(
                qkv, qkv_stride, lora, first, stop, rows, live, head * D + 2 * HALF,
                STARTS, PARTS, ROWS, D - 2 * HALF, REST_BLOCK,
            )  # fmt: skip
        if head < HEADS:
            low, high, rest = _turned_head(
                low, high, rest, q_norm, eps, table, table_stride, positions, rows, live,
                D, HALF, HALF_BLOCK, REST_BLOCK, MODE, dtype, wide,
            )  # fmt: skip
            at = q + (rows.to(tl.int64) * HEADS + head) * D
            _store_head(at, 1, low, high, rest, live, D, HALF, HALF_BLOCK, REST_BLOCK)
        else:
            slot = tl.load(slots + rows, mask=live, other=-1)
            kept = slot >= 0
            if head < HEADS + KV_HEADS:
                low, high, rest = _turned_head(
                    low, high, rest, k_norm, eps, table, table_stride, positions, rows, live,
                    D, HALF, HALF_BLOCK, REST_BLOCK, MODE, dtype, wide,
                )  # fmt: skip
                at = _in_cache(k_cache, slot, head - HEADS, BLOCK_SIZE)
                stride = k_cache.feature_stride
                _store_head(at, stride, low, high, rest, kept, D, HALF, HALF_BLOCK, REST_BLOCK)
            else:
                at = _in_cache(v_cache, slot, head - HEADS - KV_HEADS, BLOCK_SIZE)
                stride = v_cache.feature_stride
                _store_head(at, stride, low, high, rest, kept, D, HALF, HALF_BLOCK, REST_BLOCK)


def rope_kv(
    qkv: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
    mode: NormMode = "llama",
    expand: Expand | None = None,
) -> torch.Tensor:
    """Queries [T, H, D] out of `qkv` [T, (H + 2 Hkv) D]; keys and values go to the caches."""
    _, block_size, kv_heads, size = k_cache.shape
    count, half, dtype = qkv.shape[0], table.shape[1] // 2, qkv.dtype
    q_norm, k_norm = norms or (None, None)
    if q_norm is not None and mode == "llama":
        dtype = torch.promote_types(dtype, q_norm.dtype)
    q = torch.empty((count, heads, size), dtype=dtype, device=qkv.device)  # [T, H, D]
    everything = heads + 2 * kv_heads
    if expand is None:
        rows = ROWS
        grid = (triton.cdiv(count, rows) * everything,)
    else:
        rows = expand.work.rows_per_chunk
        grid = programs(expand.work.max_chunks * everything, qkv.device)
    _rope_kv[grid](
        qkv,
        qkv.stride(0),
        table,
        table.stride(0),
        positions,
        slots,
        q,
        _cache(k_cache),
        _cache(v_cache),
        q_norm,
        k_norm,
        eps,
        count,
        **kernel_arguments(expand),
        ROWS=rows,
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=size,
        HALF=half,
        HALF_BLOCK=max(16, triton.next_power_of_2(half)),
        REST_BLOCK=max(16, triton.next_power_of_2(size - 2 * half)),
        BLOCK_SIZE=block_size,
        MODE=mode,
        num_warps=4 if rows <= 16 else 8,
        num_stages=2,
    )
    return q  # [T, H, D]


@triton.jit
def _put(
    source, row_stride, head_stride, cache, row, slot,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's vectors [HEADS, SIZE] to their slot."""
    head = tl.arange(0, HEAD_BLOCK)
    inside = tl.arange(0, BLOCK)
    mask = (head < HEADS)[:, None] & (inside < SIZE)[None, :]
    at = source + row.to(tl.int64) * row_stride
    value = tl.load(at + head[:, None] * head_stride + inside[None, :], mask=mask)
    at = _in_cache(cache, slot, head, BLOCK_SIZE)
    at = at[:, None] + (inside * cache.feature_stride)[None, :]
    tl.store(at, rounded(value, cache.data.dtype.element_ty), mask=mask)


@triton.jit
def _write_kv(
    k, k_row_stride, k_head_stride, v, v_row_stride, v_head_stride, k_cache, v_cache, slots,
    HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if slot >= 0:
        _put(
            k, k_row_stride, k_head_stride, k_cache, row, slot,
            HEADS, KEYS, BLOCK_SIZE, HEAD_BLOCK, KEY_BLOCK,
        )  # fmt: skip
        _put(
            v, v_row_stride, v_head_stride, v_cache, row, slot,
            HEADS, VALUES, BLOCK_SIZE, HEAD_BLOCK, VALUE_BLOCK,
        )  # fmt: skip


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Store `k` [T, Hkv, D] and `v` [T, Hkv, Dv] at `slots` [T] of the caches, -1 nowhere."""
    count, heads, size = k.shape
    _write_kv[(count,)](
        k,
        k.stride(0),
        k.stride(1),
        v,
        v.stride(0),
        v.stride(1),
        _cache(k_cache),
        _cache(v_cache),
        slots,
        heads,
        size,
        v.shape[2],
        k_cache.shape[1],
        triton.next_power_of_2(heads),
        triton.next_power_of_2(size),
        triton.next_power_of_2(v.shape[2]),
    )
