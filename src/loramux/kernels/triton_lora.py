"""Expand of LoRA on a GPU: deltas added to a product where no other kernel takes them along."""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels.arguments import Expand
from loramux.kernels.triton_delta import (
    COLUMNS,
    MATRIX_ROWS,
    chunk_and_end,
    chunk_delta,
    chunk_of,
    kernel_arguments,
    programs,
    rounded,
    slice_at,
    tile_arguments,
    tile_columns,
    tile_delta,
    tile_programs,
    with_delta,
)
from loramux.kernels.triton_launch import cdiv, launch, wait


@triton.jit
def _expand(
    y, y_stride, lora,
    STARTS: tl.constexpr, PARTS: tl.constexpr, AFFINE: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = STARTS[len(STARTS) - 1]
    TILES: tl.constexpr = (WIDTH + COLS - 1) // COLS
    begin = tl.load(lora.counts) * TILES
    end = tl.load(lora.counts + 1) * TILES
    wait(EARLY)
    for item in range(begin + tl.program_id(0), end, tl.num_programs(0)):
        chunk = chunk_of(lora, item // TILES)
        low = item % TILES * COLS
        rows = chunk[0] + tl.arange(0, ROWS)
        # Between the others there may be chunks without members: they keep their bits.
        row_mask = (rows < chunk[1]) & (chunk[2] < chunk[3])
        columns = low + tl.arange(0, COLS)
        column_mask = columns < WIDTH
        at = y + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [ROWS, COLS]
        delta, gain = chunk_delta(
            lora,
            chunk,
            rows,
            row_mask,
            low,
            columns,
            column_mask,
            STARTS,
            PARTS,
            AFFINE,
            ROWS,
            COLS,
        )
        value = with_delta(value, gain, delta, AFFINE)
        tl.store(at, rounded(value, y.dtype.element_ty), mask=mask)


@triton.jit
def _expand_tiles(
    y, y_stride, lora,
    STARTS: tl.constexpr, PARTS: tl.constexpr, AFFINE: tl.constexpr, COLS: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = STARTS[len(STARTS) - 1]
    TILES: tl.constexpr = WIDTH // COLS
    item = tl.program_id(0)
    end = item + 1
    while item < end:
        chunk, end = chunk_and_end(lora, item, TILES)
        wait(EARLY)
        if chunk[2] < chunk[3]:
            low = item % TILES * COLS
            columns = low + tl.arange(0, COLS)
            here = columns < WIDTH
            s = slice_at(low, STARTS)
            for first in range(chunk[0], chunk[1], ROWS):
                rows = first + tl.arange(0, ROWS)
                live = rows < chunk[1]
                at = y + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
                value = tl.load(at, mask=live[:, None], other=0.0)  # [ROWS, COLS]
                delta, _, gain, _ = tile_delta(
                    lora,
                    chunk,
                    rows,
                    live,
                    s,
                    columns,
                    s,
                    columns,
                    here,
                    STARTS,
                    PARTS,
                    AFFINE,
                    False,
                    RANKS,
                )
                total = with_delta(value.to(tl.float32), gain, delta, AFFINE)
                tl.store(at, rounded(total, y.dtype.element_ty), mask=live[:, None])
        item += tl.num_programs(0)


def lora_expand(y: torch.Tensor, expand: Expand) -> None:
    """Add the deltas of `expand` to `y` [T, N] (any row stride) in place."""
    arguments, lora = (y, y.stride(0)), kernel_arguments(expand)
    width = tile_columns(expand.site.slice_starts)
    if width:
        tiles = y.shape[1] // width
        grid, tile = tile_programs(expand, tiles), tile_arguments(expand, tiles)
        launch(_expand_tiles, grid, arguments, **lora, COLS=width, **tile)
        return
    rows = max(MATRIX_ROWS, expand.work.rows_per_chunk)
    launch(
        _expand,
        programs(expand.work.max_chunks * cdiv(y.shape[1], COLUMNS), y.device),
        arguments,
        **lora,
        ROWS=rows,
        COLS=COLUMNS,
        num_warps=4 if rows <= 16 else 8,
        num_stages=2,
    )
