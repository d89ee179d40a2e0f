"""From the merged q, k and v product to rotated queries and a written cache, on a GPU.

Arithmetic runs in float32 and rounds where the twins round: without `enable_fp_fusion=False` the
compiler drops the rounding between a product and a sum.
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels.arguments import Expand, NormMode
from loramux.kernels.triton_delta import (
    MATRIX_ROWS,
    chunk_and_end,
    chunk_delta,
    chunk_of,
    kernel_arguments,
    programs,
    rounded,
    slice_at,
    tile_arguments,
    tile_delta,
    tile_programs,
    with_delta,
)
from loramux.kernels.triton_heads import Heads, angles_at, finish_head
from loramux.kernels.triton_kv import as_cache
from loramux.kernels.triton_launch import cdiv, launch, next_power_of_2, wait

ROWS = 16
"""Rows of a tile where there is no delta, so no chunk that would say it."""


@triton.jit
def _part(
    qkv, qkv_stride, lora, chunk, rows, row_mask, low,
    STARTS: tl.constexpr, PARTS: tl.constexpr, AFFINE: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns low..low+SIZE-1 of `rows`, the delta added: [ROWS, BLOCK] float32, zeros behind."""
    inside = tl.arange(0, BLOCK)
    here = inside < SIZE
    columns = low + inside
    at = qkv + rows.to(tl.int64)[:, None] * qkv_stride + columns[None, :]
    value = tl.load(at, mask=row_mask[:, None] & here[None, :], other=0.0).to(tl.float32)
    if lora is not None:
        delta, gain = chunk_delta(
            lora, chunk, rows, row_mask, low, columns, here, STARTS, PARTS, AFFINE, ROWS, BLOCK
        )
        value = with_delta(value, gain, delta, AFFINE)
        value = rounded(value, qkv.dtype.element_ty).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["count"])
def _rope_kv(
    qkv, qkv_stride, k_cache, v_cache, heads, count, lora, STARTS: tl.constexpr,
    PARTS: tl.constexpr, AFFINE: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, MODE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    dtype: tl.constexpr = qkv.dtype.element_ty
    if lora is None:
        end = (count + ROWS - 1) // ROWS * ALL
    else:
        end = tl.load(lora.counts + 1) * ALL
    wait(EARLY)
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
        angles = angles_at(heads, position, live, HALF, HALF_BLOCK)
        low = _part(
            qkv, qkv_stride, lora, chunk, rows, live, head * D,
            STARTS, PARTS, AFFINE, ROWS, HALF, HALF_BLOCK,
        )  # fmt: skip
        high = _part(
            qkv, qkv_stride, lora, chunk, rows, live, head * D + HALF,
            STARTS, PARTS, AFFINE, ROWS, HALF, HALF_BLOCK,
        )  # fmt: skip
        rest = tl.zeros((ROWS, REST_BLOCK), tl.float32)
        if D > 2 * HALF:
            rest = _part(
                qkv, qkv_stride, lora, chunk, rows, live, head * D + 2 * HALF,
                STARTS, PARTS, AFFINE, ROWS, D - 2 * HALF, REST_BLOCK,
            )  # fmt: skip
        finish_head(
            low, high, rest, head, rows, live, angles, slot, heads, k_cache, v_cache, HEADS,
            KV_HEADS, D, HALF, HALF_BLOCK, REST_BLOCK, BLOCK_SIZE, MODE, dtype,
        )  # fmt: skip


@triton.jit
def _loaded(
    qkv, qkv_stride, rows, live, low, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Columns low..low+SIZE-1: [ROWS, BLOCK]."""
    inside = tl.arange(0, BLOCK)
    at = qkv + rows.to(tl.int64)[:, None] * qkv_stride + (low + inside)[None, :]
    return tl.load(at, mask=live[:, None] & (inside < SIZE)[None, :], other=0.0)


@triton.jit
def _whole(value, gain, delta, AFFINE: tl.constexpr):
    """A part and its delta, rounded: [ROWS, BLOCK] float32."""
    return rounded(with_delta(value.to(tl.float32), gain, delta, AFFINE), value.dtype).to(
        tl.float32
    )


@triton.jit
def _tile_of_head(
    qkv, qkv_stride, k_cache, v_cache, heads, lora, chunk, rows, head, s,
    STARTS: tl.constexpr, PARTS: tl.constexpr, AFFINE: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, MODE: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """One head of `rows`."""
    REST: tl.constexpr = D - 2 * HALF
    at = head * D
    live = rows < chunk[1]
    # Asked for first: the angles wait for the position.
    position = tl.load(heads.positions + rows, mask=live, other=0)
    slot = tl.load(heads.slots + rows, mask=live, other=-1)
    low = _loaded(qkv, qkv_stride, rows, live, at, HALF, HALF_BLOCK)
    high = _loaded(qkv, qkv_stride, rows, live, at + HALF, HALF, HALF_BLOCK)
    angles = angles_at(heads, position, live, HALF, HALF_BLOCK)
    inside = tl.arange(0, HALF_BLOCK)
    low_delta, high_delta, low_gain, high_gain = tile_delta(
        lora, chunk, rows, live, s, at + inside, s, at + HALF + inside, inside < HALF, STARTS,
        PARTS, AFFINE, True, RANKS,
    )  # fmt: skip
    low, high = (
        _whole(low, low_gain, low_delta, AFFINE),
        _whole(high, high_gain, high_delta, AFFINE),
    )
    rest = tl.zeros((rows.shape[0], REST_BLOCK), tl.float32)
    if REST > 0:
        rest = _loaded(qkv, qkv_stride, rows, live, at + 2 * HALF, REST, REST_BLOCK)
        inside = tl.arange(0, REST_BLOCK)
        columns = at + 2 * HALF + inside
        delta, _, gain, _ = tile_delta(
            lora,
            chunk,
            rows,
            live,
            s,
            columns,
            s,
            columns,
            inside < REST,
            STARTS,
            PARTS,
            AFFINE,
            False,
            RANKS,
        )
        rest = _whole(rest, gain, delta, AFFINE)
    finish_head(
        low, high, rest, head, rows, live, angles, slot, heads, k_cache, v_cache, HEADS,
        KV_HEADS, D, HALF, HALF_BLOCK, REST_BLOCK, BLOCK_SIZE, MODE, qkv.dtype.element_ty,
    )  # fmt: skip


@triton.jit
def _rope_kv_tiles(
    qkv, qkv_stride, k_cache, v_cache, heads, lora,
    STARTS: tl.constexpr, PARTS: tl.constexpr, AFFINE: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    MODE: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    item = tl.program_id(0)
    end = item + 1
    while item < end:
        chunk, end = chunk_and_end(lora, item, ALL)
        wait(EARLY)
        head = item % ALL
        s = slice_at(head * D, STARTS)
        for first in range(chunk[0], chunk[1], ROWS):
            rows = first + tl.arange(0, ROWS)
            _tile_of_head(
                qkv, qkv_stride, k_cache, v_cache, heads, lora, chunk, rows, head, s, STARTS,
                PARTS, AFFINE, HEADS, KV_HEADS, D, HALF, HALF_BLOCK, REST_BLOCK, BLOCK_SIZE, MODE,
                RANKS,
            )  # fmt: skip
        item += tl.num_programs(0)


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
    heads_of = Heads(table, table.stride(0), positions, slots, q, q_norm, k_norm, eps)
    arguments = (qkv, qkv.stride(0), as_cache(k_cache), as_cache(v_cache), heads_of)
    shapes: dict[str, Any] = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "D": size,
        "HALF": half,
        "HALF_BLOCK": max(16, next_power_of_2(half)),
        "REST_BLOCK": max(16, next_power_of_2(size - 2 * half)),
        "BLOCK_SIZE": block_size,
        "MODE": mode,
    }
    lora = kernel_arguments(expand)
    if expand is not None and all(start % size == 0 for start in expand.site.slice_starts):
        grid, tile = tile_programs(expand, everything), tile_arguments(expand, everything)
        launch(_rope_kv_tiles, grid, arguments, **lora, **shapes, **tile, enable_fp_fusion=False)
        return q  # [T, H, D]
    if expand is None:
        rows = ROWS
        grid = (cdiv(count, rows) * everything,)
    else:
        rows = max(MATRIX_ROWS, expand.work.rows_per_chunk)
        grid = programs(expand.work.max_chunks * everything, qkv.device)
    launch(
        _rope_kv,
        grid,
        (*arguments, count),
        **lora,
        ROWS=rows,
        **shapes,
        num_warps=4 if rows <= 16 else 8,
        num_stages=2,
        enable_fp_fusion=False,
    )
    return q  # [T, H, D]
