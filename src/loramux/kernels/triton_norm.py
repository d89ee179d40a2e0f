"""RMS norms on a GPU, and the residual's addition before one, with a LoRA delta where one waits.

Arithmetic runs in float32 and rounds where the twins round: without `enable_fp_fusion=False` the
compiler drops the rounding between a product and a sum.
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels.arguments import Expand, NormMode
from loramux.kernels.triton_delta import (
    Tile,
    chunk_of,
    kernel_arguments,
    rounded,
    tile_delta,
    with_delta,
)
from loramux.kernels.triton_launch import cdiv, launch, next_power_of_2, wait
from loramux.kernels.triton_lora import lora_expand

TILE = Tile(16, 128, 16, 4)
"""Where a norm takes its delta by matrix products; chunks of no more rows are expanded before it."""

LARGE_TILE, MANY_CHUNKS = Tile(64, 128, 16, 8), 96
"""The same for so many chunks, which are programs enough for a GPU. With 8,192 tokens of an H100 it
takes 168, 199 and 241 us at ranks 16, 64 and 128, where the other takes 180, 279 and 322."""


@triton.jit
def normed(value, inverse, weight, MODE: tl.constexpr, dtype: tl.constexpr):
    """float32 `value` times `inverse` and the weight, rounded inside as `MODE` says."""
    result = value * inverse
    weight = weight.to(tl.float32)
    if MODE == "llama":
        return weight * rounded(result, dtype).to(tl.float32)
    elif MODE == "plain":
        return result * weight
    else:
        return result * (1.0 + weight)


@triton.jit(do_not_specialize=["inner", "count"])
def _rms_norm(
    x, outer_stride, inner_stride, inner, weight, out, count, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, MODE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    here = columns < SIZE
    mask = (rows < count)[:, None] & here[None, :]
    at = rows // inner * outer_stride + rows % inner * inner_stride
    factor = tl.load(weight + columns, mask=here, other=0.0)[None, :]
    wait(EARLY)
    value = tl.load(x + at[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / SIZE + eps)[:, None]
    value = normed(value, inverse, factor, MODE, x.dtype.element_ty)  # [ROWS, BLOCK]
    at = out + rows[:, None] * SIZE + columns[None, :]
    tl.store(at, rounded(value, out.dtype.element_ty), mask=mask)


def _norm_dtype(dtype: torch.dtype, weight: torch.Tensor, mode: NormMode) -> torch.dtype:
    """The dtype of a norm of `dtype`: a wider weight widens Llama's product, no other."""
    return torch.promote_types(dtype, weight.dtype) if mode == "llama" else dtype


def _row_warps(block: int) -> int:
    return max(1, min(16, block // 512))


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, mode: NormMode = "llama"
) -> torch.Tensor:
    """`x` [..., D], `weight` [D] -> [..., D]."""
    size = x.shape[-1]
    out = torch.empty(x.shape, dtype=_norm_dtype(x.dtype, weight, mode), device=x.device)
    if not (x.dim() in (2, 3) and x.stride(-1) == 1):
        x = x.reshape(-1, size).contiguous()  # [T, D]
    inner = 1 if x.dim() == 2 else x.shape[1]
    count = x.shape[0] * inner
    block = next_power_of_2(size)
    rows = max(1, 1024 // block)
    launch(
        _rms_norm,
        (cdiv(count, rows),),
        (x, x.stride(0), x.stride(-2), inner, weight, out, count, eps),
        SIZE=size,
        BLOCK=block,
        ROWS=rows,
        MODE=mode,
        num_warps=_row_warps(rows * block),
    )
    return out  # [..., D]


@triton.jit
def _add_norm_row(
    x, x_stride, residual, residual_stride, weight, post_weight, out, total, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    at = row.to(tl.int64)
    factor = tl.load(weight + columns, mask=mask, other=0.0)  # asked for early: it is far away
    wait(EARLY)
    value = tl.load(x + at * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    before = tl.load(residual + at * residual_stride + columns, mask=mask, other=0.0)
    value = rounded(value, residual.dtype.element_ty).to(tl.float32)
    if post_weight is not None:
        inverse = tl.rsqrt(tl.sum(value * value, 0) / SIZE + eps)
        post_factor = tl.load(post_weight + columns, mask=mask, other=0.0)
        value = normed(value, inverse, post_factor, MODE, residual.dtype.element_ty)
        value = rounded(value, total.dtype.element_ty).to(tl.float32)
    value = rounded(before.to(tl.float32) + value, total.dtype.element_ty)  # [BLOCK]
    tl.store(total + at * SIZE + columns, value, mask=mask)
    value = value.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 0) / SIZE + eps)
    value = normed(value, inverse, factor, MODE, total.dtype.element_ty)
    tl.store(out + at * SIZE + columns, rounded(value, out.dtype.element_ty), mask=mask)


@triton.jit
def _norm_tiles(
    source, residual, residual_stride, weight, target, rows, row_mask, squares, eps,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MODE: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Norm of `source`'s rows, and `residual` (or None) added, into `target`: sums of squares."""
    inverse = tl.rsqrt(squares / SIZE + eps)[:, None]
    squares = tl.zeros((ROWS,), tl.float32)
    for low in range(0, SIZE, COLS):
        columns = low + tl.arange(0, COLS)
        here = columns < SIZE
        mask = row_mask[:, None] & here[None, :]
        at = rows[:, None] * SIZE + columns[None, :]
        value = tl.load(source + at, mask=mask, other=0.0)
        factor = tl.load(weight + columns, mask=here, other=0.0)[None, :]
        value = normed(value.to(tl.float32), inverse, factor, MODE, dtype)
        value = rounded(value, target.dtype.element_ty)  # [ROWS, COLS]
        if residual is not None:
            before = residual + rows[:, None] * residual_stride + columns[None, :]
            before = tl.load(before, mask=mask, other=0.0).to(tl.float32)
            value = rounded(before + value.to(tl.float32), target.dtype.element_ty)
        tl.store(target + at, value, mask=mask)
        squares += tl.sum(value.to(tl.float32) * value.to(tl.float32), 1)
    return squares


@triton.jit
def _add_norm_tiles(
    x, x_stride, residual, residual_stride, weight, post_weight, out, total, eps, lora,
    STARTS: tl.constexpr, PARTS: tl.constexpr, AFFINE: tl.constexpr, TILES: tl.constexpr,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr,
    MODE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """For many rows: `TILES` tiles a chunk, so that one load of b serves `ROWS` rows.

    The sums wait in `total`, which the second pass finds in the cache. Chunks behind the last are
    empty."""
    wait(EARLY)
    item = tl.program_id(0)
    chunk = chunk_of(lora, item // TILES)
    first_row, end_row = chunk[0] + item % TILES * ROWS, chunk[1]
    if first_row < end_row:
        rows = (first_row + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = rows < end_row
        squares = tl.zeros((ROWS,), tl.float32)
        for low in range(0, SIZE, COLS):
            columns = low + tl.arange(0, COLS)
            here = columns < SIZE
            mask = row_mask[:, None] & here[None, :]
            at = x + rows[:, None] * x_stride + columns[None, :]
            value = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [ROWS, COLS]
            delta, _, gain, _ = tile_delta(
                lora,
                chunk,
                rows,
                row_mask,
                0,
                columns,
                0,
                columns,
                here,
                STARTS,
                PARTS,
                AFFINE,
                False,
                RANKS,
            )
            value = with_delta(value, gain, delta, AFFINE)
            value = rounded(value, residual.dtype.element_ty)
            if post_weight is None:
                before = residual + rows[:, None] * residual_stride + columns[None, :]
                before = tl.load(before, mask=mask, other=0.0).to(tl.float32)
                value = rounded(before + value.to(tl.float32), total.dtype.element_ty)
            at = total + rows[:, None] * SIZE + columns[None, :]
            tl.store(at, value.to(total.dtype.element_ty), mask=mask)
            squares += tl.sum(value.to(tl.float32) * value.to(tl.float32), 1)
        tl.debug_barrier()  # other threads may read what these wrote
        if post_weight is not None:
            squares = _norm_tiles(
                total, residual, residual_stride, post_weight, total, rows, row_mask, squares,
                eps, SIZE, ROWS, COLS, MODE, residual.dtype.element_ty,
            )  # fmt: skip
            tl.debug_barrier()
        _norm_tiles(
            total, None, 0, weight, out, rows, row_mask, squares, eps, SIZE, ROWS, COLS, MODE,
            total.dtype.element_ty,
        )  # fmt: skip


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    mode: NormMode = "llama",
    post_weight: torch.Tensor | None = None,
    expand: Expand | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x`, `residual` [T, D] -> (norm of their sum, their sum); `x` may be written to.

    A norm needs a whole row in one program. With few rows few programs would have to load B alone
    (12 microseconds where the norm takes 2), so many expand first."""
    if expand is not None and (
        expand.work.rows_per_chunk <= TILE.rows or expand.site.num_slices > 1
    ):
        lora_expand(x, expand)
        expand = None
    count, size = residual.shape
    dtype = residual.dtype
    if post_weight is not None:
        dtype = _norm_dtype(dtype, post_weight, mode)
    total = torch.empty((count, size), dtype=dtype, device=x.device)  # [T, D]
    out_dtype = _norm_dtype(dtype, weight, mode)
    out = torch.empty((count, size), dtype=out_dtype, device=x.device)  # [T, D]
    arguments = (
        x, x.stride(0), residual, residual.stride(0), weight, post_weight, out, total, eps
    )  # fmt: skip
    if expand is not None:
        tile = LARGE_TILE if expand.work.max_chunks >= MANY_CHUNKS else TILE
        tiles = cdiv(expand.work.rows_per_chunk, tile.rows)
        launch(
            _add_norm_tiles,
            (expand.work.max_chunks * tiles,),
            arguments,
            **kernel_arguments(expand),
            TILES=tiles,
            SIZE=size,
            ROWS=tile.rows,
            COLS=min(tile.columns, next_power_of_2(size)),
            RANKS=tile.ranks,
            MODE=mode,
            num_warps=tile.warps,
            num_stages=1,
            enable_fp_fusion=False,
        )
        return out, total
    block = next_power_of_2(size)
    launch(
        _add_norm_row,
        (count,),
        arguments,
        SIZE=size,
        BLOCK=block,
        MODE=mode,
        num_warps=_row_warps(block),
        enable_fp_fusion=False,
    )
    return out, total
