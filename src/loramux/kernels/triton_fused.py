"""Gates and input tokens on a GPU; a gate takes the LoRA delta that waits for it with it.

Arithmetic runs in float32 and rounds where the twins round.
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels.arguments import Activation, Expand
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

PLAIN_ROWS, PLAIN_COLUMNS = 4, 512
"""The tile of a gate without a delta."""

TOKENS = 256
"""Tokens that one program of `take_tokens` looks at."""


@triton.jit
def _gate(left, right, dtype: tl.constexpr, ACTIVATION: tl.constexpr):
    """activation(left) * right, float32, rounded to `dtype` in between."""
    if ACTIVATION == "silu":
        slope = left
    else:  # gelu's tanh form: (1 + tanh(u)) / 2 is the sigmoid of 2 u
        slope = 1.5957691216057308 * (left + 0.044715 * left * left * left)
    return rounded(left / (1.0 + tl.exp(-slope)), dtype).to(tl.float32) * right


@triton.jit(do_not_specialize=["count"])
def _gated(
    gate, gate_stride, up, up_stride, out, count, lora,
    STARTS: tl.constexpr, PARTS: tl.constexpr, AFFINE: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr, ACTIVATION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (SIZE + COLS - 1) // COLS
    if lora is None:
        end = (count + ROWS - 1) // ROWS * TILES
    else:
        end = tl.load(lora.counts + 1) * TILES
    wait(EARLY)
    for item in range(tl.program_id(0), end, tl.num_programs(0)):
        if lora is None:
            rows = item // TILES * ROWS + tl.arange(0, ROWS)
            row_mask = rows < count
        else:
            chunk = chunk_of(lora, item // TILES)
            rows = chunk[0] + tl.arange(0, ROWS)
            row_mask = rows < chunk[1]
        low = item % TILES * COLS
        columns = low + tl.arange(0, COLS)
        here = columns < SIZE
        mask = row_mask[:, None] & here[None, :]
        wide = rows.to(tl.int64)[:, None]
        left = tl.load(gate + wide * gate_stride + columns[None, :], mask=mask, other=0.0)
        right = tl.load(up + wide * up_stride + columns[None, :], mask=mask, other=0.0)
        left = left.to(tl.float32)  # [ROWS, COLS]
        right = right.to(tl.float32)  # [ROWS, COLS]
        if lora is not None:
            delta, gain = chunk_delta(
                lora, chunk, rows, row_mask, low, columns, here, STARTS, PARTS, AFFINE, ROWS, COLS
            )
            left = rounded(with_delta(left, gain, delta, AFFINE), gate.dtype.element_ty).to(
                tl.float32
            )
            delta, gain = chunk_delta(
                lora, chunk, rows, row_mask, SIZE + low, SIZE + columns, here, STARTS, PARTS, AFFINE,
                ROWS, COLS,
            )  # fmt: skip
            right = rounded(with_delta(right, gain, delta, AFFINE), up.dtype.element_ty).to(
                tl.float32
            )
        value = _gate(left, right, gate.dtype.element_ty, ACTIVATION)
        at = out + wide * SIZE + columns[None, :]
        tl.store(at, rounded(value, out.dtype.element_ty), mask=mask)


@triton.jit
def _gated_tiles(
    gate, gate_stride, up, up_stride, out, lora,
    STARTS: tl.constexpr, PARTS: tl.constexpr, AFFINE: tl.constexpr, SIZE: tl.constexpr,
    COLS: tl.constexpr,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = SIZE // COLS
    dtype: tl.constexpr = gate.dtype.element_ty
    item = tl.program_id(0)
    end = item + 1
    while item < end:
        chunk, end = chunk_and_end(lora, item, TILES)
        wait(EARLY)
        low = item % TILES * COLS
        columns = low + tl.arange(0, COLS)
        here = columns < SIZE
        s, t = slice_at(low, STARTS), slice_at(SIZE + low, STARTS)
        for first in range(chunk[0], chunk[1], ROWS):
            rows = first + tl.arange(0, ROWS)
            live = rows < chunk[1]
            mask = live[:, None]
            wide = rows.to(tl.int64)[:, None]
            left = tl.load(gate + wide * gate_stride + columns[None, :], mask=mask, other=0.0)
            right = tl.load(up + wide * up_stride + columns[None, :], mask=mask, other=0.0)
            one, other, gain, other_gain = tile_delta(
                lora,
                chunk,
                rows,
                live,
                s,
                columns,
                t,
                SIZE + columns,
                here,
                STARTS,
                PARTS,
                AFFINE,
                True,
                RANKS,
            )
            one = with_delta(left.to(tl.float32), gain, one, AFFINE)  # [ROWS, COLS]
            other = with_delta(right.to(tl.float32), other_gain, other, AFFINE)  # [ROWS, COLS]
            one, other = rounded(one, dtype).to(tl.float32), rounded(other, dtype).to(tl.float32)
            value = _gate(one, other, dtype, ACTIVATION)
            tl.store(out + wide * SIZE + columns[None, :], rounded(value, dtype), mask=mask)
        item += tl.num_programs(0)


def _run_gated(
    gate: torch.Tensor, up: torch.Tensor, activation: Activation, expand: Expand | None
) -> torch.Tensor:
    count, size = gate.shape
    out = torch.empty((count, size), dtype=gate.dtype, device=gate.device)  # [T, I]
    arguments = (gate, gate.stride(0), up, up.stride(0), out)
    width = 0 if expand is None else tile_columns(expand.site.slice_starts)
    if expand is not None and width and size % width == 0:
        launch(
            _gated_tiles,
            tile_programs(expand, size // width),
            arguments,
            **kernel_arguments(expand),
            SIZE=size,
            COLS=width,
            ACTIVATION=activation,
            **tile_arguments(expand, size // width),
        )
        return out  # [T, I]
    if expand is None:
        rows, width = PLAIN_ROWS, PLAIN_COLUMNS
        grid = (cdiv(count, rows) * cdiv(size, width),)
    else:
        rows, width = max(MATRIX_ROWS, expand.work.rows_per_chunk), COLUMNS
        grid = programs(expand.work.max_chunks * cdiv(size, width), gate.device)
    launch(
        _gated,
        grid,
        (*arguments, count),
        **kernel_arguments(expand),
        SIZE=size,
        ROWS=rows,
        COLS=width,
        ACTIVATION=activation,
        num_warps=4 if rows <= 16 else 8,
        num_stages=2,
    )
    return out  # [T, I]


def gated(
    gate_up: torch.Tensor, activation: Activation = "silu", expand: Expand | None = None
) -> torch.Tensor:
    """activation(gate) * up of `gate_up` [T, 2 I] (any row stride) -> [T, I]."""
    size = gate_up.shape[1] // 2
    return _run_gated(gate_up[:, :size], gate_up[:, size:], activation, expand)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(`gate`) * `up`, both [T, I] (any row stride) -> [T, I]."""
    return _run_gated(gate, up, "silu", None)


@triton.jit(do_not_specialize=["count"])
def _take_tokens(
    ids, sources, chosen, out, count, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    wait(EARLY)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    source = tl.load(sources + at, mask=here, other=-1)
    own = tl.load(ids + at, mask=here, other=0).to(tl.int64)
    other = tl.load(chosen + source, mask=source >= 0, other=0).to(tl.int64)
    tl.store(out + at, tl.where(source >= 0, other, own), mask=here)


def take_tokens(ids: torch.Tensor, sources: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """`ids` [T], or where `sources` [T] >= 0 the token chosen[source] -> [T] int64."""
    count = ids.shape[0]
    out = torch.empty(count, dtype=torch.int64, device=ids.device)  # [T]
    grid = (cdiv(count, TOKENS),)
    launch(_take_tokens, grid, (ids, sources, chosen, out, count), BLOCK=TOKENS)
    return out  # [T]
