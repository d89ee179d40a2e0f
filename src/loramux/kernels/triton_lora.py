"""Shrink and expand of LoRA on a GPU, and the delta of a tile for the kernels that fold it in.

What a step holds is read on the device from its `WorkList`; a grid depends on shapes alone, so a
captured graph stays right for every mixture. Programs loop over the work in strides of the grid.
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels.arguments import Expand, LoRASite, WorkList

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Triton runs in Python, where bf16 products are wrong and casts to bf16 cut off."""

COLUMNS = 128
"""Width of the output tiles of an expand."""

FEATURES = 128
"""How much of the input one step of a shrink takes."""

PROGRAMS_PER_UNIT = 8
"""Programs a multiprocessor gets at most; each streams little, so several must run at once."""


class Lora(NamedTuple):
    """An `Expand` (or a shrink's arguments) as a kernel takes it."""

    h: torch.Tensor  # [P, T, W]
    part_stride: int
    row_stride: int
    b: torch.Tensor  # [R, N]
    row_r: torch.Tensor  # [S, R]
    row_scale: torch.Tensor  # [S, R]
    pool_rows: int
    chunks: torch.Tensor  # [C, 4]
    counts: torch.Tensor  # [2]
    member_rows: torch.Tensor  # [M]
    member_columns: torch.Tensor  # [M]
    member_scales: torch.Tensor  # [M]


def packed(site: LoRASite, h: torch.Tensor, work: WorkList) -> Lora:
    return Lora(
        h,
        h.stride(0),
        h.stride(1),
        site.b,
        site.row_r,
        site.row_scale,
        site.row_r.shape[1],
        work.chunks,
        work.counts,
        work.member_rows,
        work.member_columns,
        work.member_scales,
    )


@cache
def _most_programs(device: torch.device) -> int:
    if device.type == "cpu":
        return 5  # interpreted: few, so that the tests see programs loop
    units: int = torch.cuda.get_device_properties(device).multi_processor_count
    return units * PROGRAMS_PER_UNIT


def programs(items: int, device: torch.device) -> tuple[int]:
    """The grid for at most so many work items."""
    return (min(items, _most_programs(device)),)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """`x` in `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def product(left, right):
    """`left` [M, K] @ `right` [K, N], summed in float32."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def chunk_of(lora, index):
    """(first row, end row, first member, end member) of chunk `index`."""
    at = lora.chunks + index * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def slice_bounds(s, STARTS: tl.constexpr):
    """First and end column of slice `s`."""
    SLICES: tl.constexpr = len(STARTS) - 1
    begin = 0
    end = STARTS[1]
    for other in tl.static_range(1, SLICES):
        begin = tl.where(s >= other, STARTS[other], begin)
        end = tl.where(s >= other, STARTS[other + 1], end)
    return begin, end


@triton.jit
def slices_between(low, high, STARTS: tl.constexpr):
    """The slices that columns low..high-1 lie in: first and last."""
    SLICES: tl.constexpr = len(STARTS) - 1
    first = 0
    last = 0
    for other in tl.static_range(1, SLICES):
        first += tl.where(low >= STARTS[other], 1, 0)
        last += tl.where(high > STARTS[other], 1, 0)
    return first, last


@triton.jit
def shrunk(lora, at, mask, PARTS: tl.constexpr):
    """The sum of the parts of `h` at the offsets `at`, rounded to the dtype of `b`."""
    total = tl.load(lora.h + at, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        one = tl.load(lora.h + part * lora.part_stride + at, mask=mask, other=0.0)
        total += one.to(tl.float32)
    return rounded(total, lora.b.dtype.element_ty)


@triton.jit
def chunk_delta(
    lora, first, stop, rows, row_mask, low, columns, column_mask,
    STARTS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The delta [ROWS, COLS] float32 of a chunk's `rows` at `columns`, which begin at `low`.

    Nothing but what the members own is loaded: the rest may be NaN."""
    SLICES: tl.constexpr = len(STARTS) - 1
    WIDTH: tl.constexpr = STARTS[SLICES]
    total = tl.zeros((ROWS, COLS), tl.float32)
    first_slice, last_slice = slices_between(low, low + COLS, STARTS)
    for s in range(first_slice, last_slice + 1):
        own = column_mask
        if SLICES > 1:
            begin, end = slice_bounds(s, STARTS)
            own = column_mask & (columns >= begin) & (columns < end)
        for member in range(first, stop):
            p = tl.load(lora.member_rows + member)
            r = tl.load(lora.row_r + s * lora.pool_rows + p)
            factor = tl.load(lora.row_scale + s * lora.pool_rows + p)
            factor *= tl.load(lora.member_scales + member)
            column = tl.load(lora.member_columns + member)
            for k in range(0, r, 16):
                ranks = k + tl.arange(0, 16)
                live = ranks < r
                at = rows.to(tl.int64)[:, None] * lora.row_stride
                at += ((column + ranks) * SLICES + s)[None, :]
                left = shrunk(lora, at, row_mask[:, None] & live[None, :], PARTS)  # [ROWS, 16]
                at = (p + ranks).to(tl.int64)[:, None] * WIDTH + columns[None, :]
                mask = live[:, None] & own[None, :]
                right = tl.load(lora.b + at, mask=mask, other=0.0)  # [16, COLS]
                total += product(left, right) * factor
    return total


@triton.jit
def _expand(
    y, y_stride, lora,
    STARTS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = STARTS[len(STARTS) - 1]
    TILES: tl.constexpr = (WIDTH + COLS - 1) // COLS
    begin = tl.load(lora.counts) * TILES
    end = tl.load(lora.counts + 1) * TILES
    for item in range(begin + tl.program_id(0), end, tl.num_programs(0)):
        first_row, end_row, first, stop = chunk_of(lora, item // TILES)
        low = item % TILES * COLS
        rows = first_row + tl.arange(0, ROWS)
        row_mask = rows < end_row
        columns = low + tl.arange(0, COLS)
        column_mask = columns < WIDTH
        at = y + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [ROWS, COLS]
        value += chunk_delta(
            lora, first, stop, rows, row_mask, low, columns, column_mask, STARTS, PARTS, ROWS, COLS
        )
        tl.store(at, rounded(value, y.dtype.element_ty), mask=mask)


def lora_expand(y: torch.Tensor, expand: Expand) -> None:
    """Add the deltas of `expand` to `y` [T, N] (any row stride) in place."""
    site, work = expand.site, expand.work
    rows = work.rows_per_chunk
    grid = programs(work.max_chunks * triton.cdiv(y.shape[1], COLUMNS), y.device)
    _expand[grid](
        y,
        y.stride(0),
        packed(site, expand.h, work),
        site.slice_starts,
        expand.h.shape[0],
        rows,
        COLUMNS,
        num_warps=4 if rows <= 16 else 8,
        num_stages=2,
    )


@triton.jit
def _shrink(
    x, x_stride, a, a_slice_stride, a_row_stride, lora,
    WIDTH: tl.constexpr, SLICES: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    # All parts take the same number of whole steps; the last ones may find nothing left.
    SPAN: tl.constexpr = (WIDTH + STEP * PARTS - 1) // (STEP * PARTS) * STEP
    begin = tl.load(lora.counts) * (SLICES * PARTS)
    end = tl.load(lora.counts + 1) * (SLICES * PARTS)
    for item in range(begin + tl.program_id(0), end, tl.num_programs(0)):
        first_row, end_row, first, stop = chunk_of(lora, item // (SLICES * PARTS))
        s = item // PARTS % SLICES
        part = item % PARTS
        rows = first_row + tl.arange(0, ROWS)
        row_mask = rows < end_row
        for member in range(first, stop):
            p = tl.load(lora.member_rows + member)
            r = tl.load(lora.row_r + s * lora.pool_rows + p)
            column = tl.load(lora.member_columns + member)
            for k in range(0, r, 16):
                ranks = k + tl.arange(0, 16)
                live = ranks < r
                x_rows = x + rows.to(tl.int64)[:, None] * x_stride
                a_rows = (
                    a
                    + s.to(tl.int64) * a_slice_stride
                    + (p + ranks).to(tl.int64)[:, None] * a_row_stride
                )
                total = tl.zeros((ROWS, 16), tl.float32)
                for low in range(part * SPAN, tl.minimum((part + 1) * SPAN, WIDTH), STEP):
                    inputs = low + tl.arange(0, STEP)
                    here = (inputs < WIDTH)[None, :]
                    left = tl.load(
                        x_rows + inputs[None, :], mask=row_mask[:, None] & here, other=0.0
                    )
                    right = tl.load(a_rows + inputs[None, :], mask=live[:, None] & here, other=0.0)
                    left = rounded(left, a.dtype.element_ty)  # [ROWS, STEP]
                    total += product(left, tl.trans(right))
                at = lora.h + part * lora.part_stride + rows.to(tl.int64)[:, None] * lora.row_stride
                at += ((column + ranks) * SLICES + s)[None, :]
                mask = row_mask[:, None] & live[None, :]
                tl.store(at, rounded(total, lora.h.dtype.element_ty), mask=mask)


def lora_shrink(x: torch.Tensor, site: LoRASite, work: WorkList, h: torch.Tensor) -> None:
    """Fill `h` [P, T, W] with P partial sums over the features of x [T, in] @ A^T."""
    a, parts, rows = site.a, h.shape[0], work.rows_per_chunk
    slices, _, width = a.shape
    grid = programs(work.max_chunks * slices * parts, x.device)
    _shrink[grid](
        x,
        x.stride(0),
        a,
        a.stride(0),
        a.stride(1),
        packed(site, h, work),
        width,
        slices,
        parts,
        rows,
        FEATURES,
        num_warps=4,
        num_stages=3,
    )


def kernel_arguments(expand: Expand | None) -> dict[str, Any]:
    """What every kernel with a folded delta takes for it; without one, `lora` is None."""
    if expand is None:
        return {"lora": None, "STARTS": (0,), "PARTS": 1}
    site, h = expand.site, expand.h
    return {
        "lora": packed(site, h, expand.work),
        "STARTS": site.slice_starts,
        "PARTS": h.shape[0],
    }
