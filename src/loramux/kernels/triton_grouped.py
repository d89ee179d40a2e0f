"""Rows sorted by expert times their experts' weights, on a GPU: torch's kernel, or one in tiles.

Neither asks the device how many rows an expert has, so both may be captured.
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch.nn import functional as F

from loramux.kernels.arguments import Expand
from loramux.kernels.triton_delta import (
    chunk_delta,
    chunk_of,
    kernel_arguments,
    product,
    rounded,
)
from loramux.kernels.triton_launch import cdiv, launch, next_power_of_2, wait
from loramux.kernels.triton_lora import lora_expand


class GroupedTile(NamedTuple):
    """What one program computes, how much of the input it takes at a time, and with what."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


FEW = GroupedTile(16, 64, 128, 4, 4)
"""An expert has up to 16 rows on average: all there is to do is to read its weight."""
SOME = GroupedTile(64, 128, 64, 4, 4)
MANY = GroupedTile(128, 128, 64, 8, 4)
WIDE_FEW = GroupedTile(16, 64, 64, 4, 3)
"""For float32, whose products no tensor core computes."""
WIDE_MANY = GroupedTile(64, 64, 32, 4, 3)

LEAST_DEPTH = 32

MOST_TILED = 64
"""Rows an expert on average, up to which tiles are faster than torch's kernel: on an H100 with 128
experts of 2048 x 1536, 21 against 31 microseconds for 8 rows in all, 263 against 289 for 512, 293
against 308 for 4,096; for 65,536 it is 941 against 717."""

MOST_FOLDED = 128
"""Rows up to which a product adds its delta itself, which saves a launch: on an H100, experts of 768 x
2048, 12.5 against 14.1 microseconds for 8 rows, 67 against 72 for 64 with 8 adapters; but 160 against
148 for 512, and 1,436 against 698 for 65,536, where the tiles hold too much in registers."""

MOST_GROUPS = 1024
"""Experts that torch's kernel takes."""


def tile_for(rows: int, experts: int, dtype: torch.dtype) -> GroupedTile:
    """The tile for so many rows of so many experts."""
    mean = rows / min(rows, experts) if rows else 0.0
    if dtype.itemsize > 2:
        return WIDE_FEW if mean <= FEW.rows else WIDE_MANY
    if mean <= FEW.rows:
        return FEW
    return SOME if mean <= SOME.rows else MANY


@triton.jit
def _tile_by_number(ends, number, EXPERTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """(expert, first row, end row) of tile `number`; expert e's tiles begin with number
    e + (its first row) // ROWS, which leaves room enough for all before. No rows: nothing there."""
    experts = tl.arange(0, WIDTH)
    starts = tl.load(ends + experts - 1, mask=(experts > 0) & (experts < EXPERTS), other=0)
    begun = (experts < EXPERTS) & (experts + starts // ROWS <= number)
    expert = tl.sum(begun.to(tl.int32), 0) - 1
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    first = start + (number - expert - start // ROWS) * ROWS
    return expert, first, tl.load(ends + expert)


@triton.jit
def _tile_by_row(ends, row, EXPERTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """(expert, first row, end row) of the tile that begins at `row`; no rows: none does."""
    experts = tl.arange(0, WIDTH)
    bounds = tl.load(ends + experts, mask=experts < EXPERTS, other=2147483647)
    expert = tl.sum((bounds <= row).to(tl.int32), 0)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    return expert, row, tl.where((row - start) % ROWS == 0, end, row)


@triton.jit(do_not_specialize=["count"])
def _grouped(
    x, x_stride, x_step, weight, expert_stride, w_stride, w_step, ends, out, count, row_chunks, lora,
    EXPERTS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BY_ROW: tl.constexpr,
    BOUNDS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    STARTS: tl.constexpr, PARTS: tl.constexpr, AFFINE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait(EARLY)
    if BY_ROW:
        expert, first, end = _tile_by_row(ends, tl.program_id(1), EXPERTS, BOUNDS, ROWS)
    else:
        expert, first, end = _tile_by_number(ends, tl.program_id(1), EXPERTS, BOUNDS, ROWS)
    if first < end:
        rows = first + tl.arange(0, ROWS)
        columns = tl.program_id(0) * COLS + tl.arange(0, COLS)
        inside = tl.arange(0, DEPTH)
        # What lies outside is computed from something inside, and not stored: no load has a mask.
        x_rows = tl.minimum(rows, count - 1).to(tl.int64) * x_stride
        w_rows = tl.minimum(columns, WIDTH - 1).to(tl.int64) * w_stride
        left_at = x + x_rows[:, None] + (inside * x_step)[None, :]
        right_at = weight + expert.to(tl.int64) * expert_stride
        right_at += w_rows[:, None] + (inside * w_step)[None, :]
        total = tl.zeros((ROWS, COLS), tl.float32)
        for low in range(0, SIZE, DEPTH):
            if SIZE % DEPTH == 0:
                left = tl.load(left_at)  # [ROWS, DEPTH]
                right = tl.load(right_at)  # [COLS, DEPTH]
            else:
                here = (low + inside < SIZE)[None, :]
                left = tl.load(left_at, mask=here, other=0.0)
                right = tl.load(right_at, mask=here, other=0.0)
            total += product(left, tl.trans(right))
            left_at += DEPTH * x_step
            right_at += DEPTH * w_step
        if lora is not None:
            low = tl.program_id(0) * COLS
            last = tl.minimum(end, first + ROWS) - 1
            for index in range(tl.load(row_chunks + first), tl.load(row_chunks + last) + 1):
                chunk = chunk_of(lora, index)
                own = (rows >= chunk[0]) & (rows < chunk[1])
                total += chunk_delta(  # experts have no gains
                    lora,
                    chunk,
                    rows,
                    own,
                    low,
                    columns,
                    columns < WIDTH,
                    STARTS,
                    PARTS,
                    False,
                    ROWS,
                    COLS,
                )[0]
        at = out + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        mask = (rows < end)[:, None] & (columns < WIDTH)[None, :]
        tl.store(at, rounded(total, out.dtype.element_ty), mask=mask)


def grouped_tiles(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    expand: Expand | None = None,
    tile: GroupedTile | None = None,
) -> torch.Tensor:
    """`grouped_linear` in tiles of our own: any strides, float32, float16 or bfloat16."""
    count, size = x.shape
    experts, width, _ = weight.shape
    out = torch.empty((count, width), dtype=x.dtype, device=x.device)  # [S, out]
    if count == 0:
        return out
    tile = tile or tile_for(count, experts, x.dtype)
    depth = tile.depth
    while size % depth and depth > LEAST_DEPTH:
        depth //= 2  # steps that come out even need no masks
    by_number = count // tile.rows + experts
    row_chunks = None if expand is None else expand.work.row_chunks
    launch(
        _grouped,
        (cdiv(width, tile.columns), min(count, by_number)),
        (x, *x.stride(), weight, *weight.stride(), ends, out, count, row_chunks),
        **kernel_arguments(expand),
        EXPERTS=experts,
        SIZE=size,
        WIDTH=width,
        BY_ROW=count <= by_number,
        BOUNDS=next_power_of_2(experts),
        ROWS=tile.rows,
        COLS=tile.columns,
        DEPTH=depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out  # [S, out]


def grouped_mm(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`grouped_linear` by torch's kernel, where `is_for_grouped_mm`."""
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)  # [S, out]


@cache
def _has_grouped_mm(device: torch.device) -> bool:
    """Whether torch's kernel is there; elsewhere it asks the device for the ends, and waits."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _is_aligned(matrix: torch.Tensor) -> bool:
    """Whether rows (or columns) of [..., M, N] are contiguous and begin at multiples of 16 bytes."""
    rows, columns = matrix.shape[-2:]
    row, column = matrix.stride()[-2:]
    if column == 1 and row >= columns:
        outer, others = row, matrix.stride()[:-2]
    elif row == 1 and column >= rows:
        outer, others = column, matrix.stride()[:-2]
    else:
        return False
    steps = (outer, *others)
    size = matrix.element_size()
    return matrix.data_ptr() % 16 == 0 and all(step * size % 16 == 0 for step in steps)


def is_for_grouped_mm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch's kernel takes these, and gives back rows without gaps."""
    return (
        _has_grouped_mm(x.device)
        and x.dtype == weight.dtype == torch.bfloat16
        and x.shape[0] > 0
        and weight.shape[0] < MOST_GROUPS
        and weight.shape[1] * weight.element_size() % 16 == 0
        and _is_aligned(x)
        and _is_aligned(weight)
    )


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, expand: Expand | None = None
) -> torch.Tensor:
    """`x` [S, in] times `weight` [E, out, in] transposed, expert by expert, plus the deltas of `expand`
    -> [S, out]."""
    if expand is not None and x.shape[0] <= MOST_FOLDED:
        return grouped_tiles(x, weight, ends, expand)  # [S, out]
    many = x.shape[0] > MOST_TILED * weight.shape[0]
    if many and is_for_grouped_mm(x, weight):
        y = grouped_mm(x, weight, ends)  # [S, out]
    else:
        y = grouped_tiles(x, weight, ends)  # [S, out]
    if expand is not None:
        lora_expand(y, expand)
    return y
