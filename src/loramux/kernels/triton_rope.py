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
from loramux.kernels.triton_lora import (
    FEW_ROWS,
    MATRIX_ROWS,
    chunk_delta,
    chunk_of,
    first_delta,
    first_h,
    first_tile,
    kernel_arguments,
    programs,
    rest_delta,
    rounded,
    slice_at,
)
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


class Heads(NamedTuple):
    """What becomes of the heads, as a kernel takes it."""

    table: torch.Tensor  # [P, rot]
    table_stride: int
    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T]
    q: torch.Tensor  # [T, H, D]
    k_cache: Cache
    v_cache: Cache
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    eps: float


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
    qkv, qkv_stride, lora, chunk, rows, row_mask, low,
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
            lora, chunk, rows, row_mask, low, columns, here, STARTS, PARTS, ROWS, BLOCK
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
def _angles(heads, position, live, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """cos and sin at each `position` [ROWS]: [ROWS, BLOCK] each, as the table has them."""
    inside = tl.arange(0, BLOCK)
    at = heads.table + position.to(tl.int64)[:, None] * heads.table_stride + inside[None, :]
    mask = live[:, None] & (inside < HALF)[None, :]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + HALF, mask=mask, other=0.0)


@triton.jit
def _rotated(low, high, angles, dtype: tl.constexpr):
    """The two halves turned; every product is rounded, as Hugging Face's code does."""
    cos = rounded(angles[0], dtype).to(tl.float32)  # [ROWS, BLOCK]
    sin = rounded(angles[1], dtype).to(tl.float32)
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
    low, high, rest, norm, eps, angles,
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
    low, high = _rotated(low, high, angles, wide)
    return low, high, rest


@triton.jit
def _finish_head(
    low, high, rest, head, rows, live, angles, slot, heads,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    MODE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Norm, turn and store a head of queries or of keys; store a head of values."""
    q, k_cache, v_cache = heads.q, heads.k_cache, heads.v_cache
    wide: tl.constexpr = q.dtype.element_ty
    if head < HEADS:
        low, high, rest = _turned_head(
            low, high, rest, heads.q_norm, heads.eps, angles,
            D, HALF, HALF_BLOCK, REST_BLOCK, MODE, dtype, wide,
        )  # fmt: skip
        at = q + (rows.to(tl.int64) * HEADS + head) * D
        _store_head(at, 1, low, high, rest, live, D, HALF, HALF_BLOCK, REST_BLOCK)
    else:
        kept = slot >= 0
        if head < HEADS + KV_HEADS:
            low, high, rest = _turned_head(
                low, high, rest, heads.k_norm, heads.eps, angles,
                D, HALF, HALF_BLOCK, REST_BLOCK, MODE, dtype, wide,
            )  # fmt: skip
            at = _in_cache(k_cache, slot, head - HEADS, BLOCK_SIZE)
            stride = k_cache.feature_stride
            _store_head(at, stride, low, high, rest, kept, D, HALF, HALF_BLOCK, REST_BLOCK)
        else:
            at = _in_cache(v_cache, slot, head - HEADS - KV_HEADS, BLOCK_SIZE)
            stride = v_cache.feature_stride
            _store_head(at, stride, low, high, rest, kept, D, HALF, HALF_BLOCK, REST_BLOCK)


@triton.jit(do_not_specialize=["count"])
def _rope_kv(
    qkv, qkv_stride, heads, count, lora, STARTS: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    dtype: tl.constexpr = qkv.dtype.element_ty
    if lora is None:
        end = (count + ROWS - 1) // ROWS * ALL
    else:
        end = tl.load(lora.counts + 1) * ALL
    for item in range(tl.program_id(0), end, tl.num_programs(0)):
        chunk = None
        if lora is None:
            rows = item // ALL * ROWS + tl.arange(0, ROWS)
            live = rows < count
        else:
            chunk = chunk_of(lora, item // ALL)
            rows = chunk[0] + tl.arange(0, ROWS)
            live = rows < chunk[1]
        head = item % ALL
        # Asked for first: the angles wait for the position.
        position = tl.load(heads.positions + rows, mask=live, other=0)
        slot = tl.load(heads.slots + rows, mask=live, other=-1)
        angles = _angles(heads, position, live, HALF, HALF_BLOCK)
        low = _part(
            qkv, qkv_stride, lora, chunk, rows, live, head * D,
            STARTS, PARTS, ROWS, HALF, HALF_BLOCK,
        )  # fmt: skip
        high = _part(
            qkv, qkv_stride, lora, chunk, rows, live, head * D + HALF,
            STARTS, PARTS, ROWS, HALF, HALF_BLOCK,
        )  # fmt: skip
        rest = tl.zeros((ROWS, REST_BLOCK), tl.float32)
        if D > 2 * HALF:
            rest = _part(
                qkv, qkv_stride, lora, chunk, rows, live, head * D + 2 * HALF,
                STARTS, PARTS, ROWS, D - 2 * HALF, REST_BLOCK,
            )  # fmt: skip
        _finish_head(
            low, high, rest, head, rows, live, angles, slot, heads, HEADS, KV_HEADS, D, HALF,
            HALF_BLOCK, REST_BLOCK, BLOCK_SIZE, MODE, dtype,
        )  # fmt: skip


@triton.jit
def _part_tile(lora, chunk, s, low, WIDTH: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The `first_tile` of columns low..low+SIZE-1."""
    inside = tl.arange(0, BLOCK)
    return first_tile(lora, chunk, s, low + inside, inside < SIZE, WIDTH)


@triton.jit
def _row_part(qkv, qkv_stride, row, low, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Columns low..low+SIZE-1 of one row: [BLOCK]."""
    inside = tl.arange(0, BLOCK)
    at = qkv + tl.cast(row, tl.int64) * qkv_stride + low + inside
    return tl.load(at, mask=inside < SIZE, other=0.0)


@triton.jit
def _whole_part(
    value, lora, chunk, tile, h, row, s, low,
    STARTS: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A `_row_part` and its delta, rounded: [1, BLOCK] float32."""
    inside = tl.arange(0, BLOCK)
    here = inside < SIZE
    total = value.to(tl.float32) + first_delta(tile, h)
    total += rest_delta(lora, chunk, tile, row, s, low + inside, here, STARTS, PARTS)
    return rounded(total, value.dtype).to(tl.float32)[None, :]


@triton.jit
def _rope_kv_rows(
    qkv, qkv_stride, heads, lora, STARTS: tl.constexpr, PARTS: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """One item a program; those of the chunks that are not in use find no rows."""
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    SLICES: tl.constexpr = len(STARTS) - 1
    WIDTH: tl.constexpr = STARTS[SLICES]
    REST: tl.constexpr = D - 2 * HALF
    dtype: tl.constexpr = qkv.dtype.element_ty
    item = tl.program_id(0)
    chunk = chunk_of(lora, item // ALL)
    if chunk[0] < chunk[1]:
        rows = chunk[0] + tl.arange(0, 1)
        position = tl.load(heads.positions + rows)
        slot = tl.load(heads.slots + rows)
        head = item % ALL
        at = head * D
        mid, back = at + HALF, at + 2 * HALF
        s = slice_at(at, STARTS)
        tile = _part_tile(lora, chunk, s, at, WIDTH, HALF, HALF_BLOCK)
        mid_tile = _part_tile(lora, chunk, s, mid, WIDTH, HALF, HALF_BLOCK)
        if REST > 0:
            back_tile = _part_tile(lora, chunk, s, back, WIDTH, REST, REST_BLOCK)
        # A row's inputs are asked for before those of the row in front of it are used.
        left = _row_part(qkv, qkv_stride, chunk[0], at, HALF, HALF_BLOCK)
        right = _row_part(qkv, qkv_stride, chunk[0], mid, HALF, HALF_BLOCK)
        h = first_h(lora, chunk, chunk[0], s, SLICES, PARTS)
        for row in range(chunk[0], chunk[1]):
            rows = row + tl.arange(0, 1)
            live = rows < chunk[1]
            angles = _angles(heads, position, live, HALF, HALF_BLOCK)
            low = _whole_part(
                left, lora, chunk, tile, h, row, s, at, STARTS, PARTS, HALF, HALF_BLOCK
            )
            high = _whole_part(
                right, lora, chunk, mid_tile, h, row, s, mid, STARTS, PARTS, HALF, HALF_BLOCK
            )
            rest = tl.zeros((1, REST_BLOCK), tl.float32)
            if REST > 0:
                rest = _whole_part(
                    _row_part(qkv, qkv_stride, row, back, REST, REST_BLOCK), lora, chunk, back_tile,
                    h, row, s, back, STARTS, PARTS, REST, REST_BLOCK,
                )  # fmt: skip
            _finish_head(
                low, high, rest, head, rows, live, angles, slot, heads, HEADS, KV_HEADS, D, HALF,
                HALF_BLOCK, REST_BLOCK, BLOCK_SIZE, MODE, dtype,
            )  # fmt: skip
            after = tl.minimum(row + 1, chunk[1] - 1)
            position = tl.load(heads.positions + after + tl.arange(0, 1))
            slot = tl.load(heads.slots + after + tl.arange(0, 1))
            left = _row_part(qkv, qkv_stride, after, at, HALF, HALF_BLOCK)
            right = _row_part(qkv, qkv_stride, after, mid, HALF, HALF_BLOCK)
            h = first_h(lora, chunk, after, s, SLICES, PARTS)


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
    arguments = Heads(
        table, table.stride(0), positions, slots, q, _cache(k_cache), _cache(v_cache), q_norm,
        k_norm, eps,
    )  # fmt: skip
    shapes = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "D": size,
        "HALF": half,
        "HALF_BLOCK": max(16, triton.next_power_of_2(half)),
        "REST_BLOCK": max(16, triton.next_power_of_2(size - 2 * half)),
        "BLOCK_SIZE": block_size,
        "MODE": mode,
    }
    lora = kernel_arguments(expand)
    if expand is not None and _row_by_row(expand, size):
        grid = (expand.work.max_chunks * everything,)
        _rope_kv_rows[grid](qkv, qkv.stride(0), arguments, **lora, **shapes, num_warps=1)
        return q  # [T, H, D]
    if expand is None:
        rows = ROWS
        grid = (triton.cdiv(count, rows) * everything,)
    else:
        rows = max(MATRIX_ROWS, expand.work.rows_per_chunk)
        grid = programs(expand.work.max_chunks * everything, qkv.device)
    _rope_kv[grid](
        qkv,
        qkv.stride(0),
        arguments,
        count,
        **lora,
        ROWS=rows,
        **shapes,
        num_warps=4 if rows <= 16 else 8,
        num_stages=2,
    )
    return q  # [T, H, D]


def _row_by_row(expand: Expand, size: int) -> bool:
    """Whether rows are few, and no head lies in two slices."""
    few = expand.work.rows_per_chunk <= FEW_ROWS
    return few and all(start % size == 0 for start in expand.site.slice_starts)


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
    at = source + tl.cast(row, tl.int64) * row_stride
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
