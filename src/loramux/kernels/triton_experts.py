"""Rows into the order of the experts and back, on a GPU."""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels.triton_delta import rounded
from loramux.kernels.triton_launch import cdiv, launch, next_power_of_2, wait

COLUMNS = 1024
"""What a program copies or sums of a row."""


@triton.jit
def _take_rows(x, x_stride, order, out, K: tl.constexpr, SIZE: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLS + tl.arange(0, COLS)
    here = columns < SIZE
    token = (tl.load(order + row) // K).to(tl.int64)
    value = tl.load(x + token * x_stride + columns, mask=here)
    tl.store(out + row * SIZE + columns, value, mask=here)


def take_rows(x: torch.Tensor, order: torch.Tensor, top_k: int) -> torch.Tensor:
    """`x` [T, H] (any row stride) -> [S, H], the row of the token of each pair in `order` [S].

    It does not start early, and so whatever follows it may read the routing before it waits, as
    `triton_launch` says: kernels read the chunks and counts of a `WorkList` before."""
    count, size = order.shape[0], x.shape[1]
    if x.stride(1) != 1:
        x = x.contiguous()  # [T, H]
    out = torch.empty((count, size), dtype=x.dtype, device=x.device)  # [S, H]
    block = min(COLUMNS, next_power_of_2(size))
    grid = (count, cdiv(size, block))
    arguments = (x, x.stride(0), order, out)
    launch(_take_rows, grid, arguments, K=top_k, SIZE=size, COLS=block)
    return out  # [S, H]


@triton.jit
def _combine(
    y, y_stride, places, weights, token_stride, pair_stride, out,
    K: tl.constexpr, SIZE: tl.constexpr, COLS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLS + tl.arange(0, COLS)
    here = columns < SIZE
    wait(EARLY)
    total = tl.zeros((COLS,), tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places + token * K + k).to(tl.int64)
        weight = tl.load(weights + token * token_stride + k * pair_stride).to(tl.float32)
        row = tl.load(y + place * y_stride + columns, mask=here, other=0.0)
        total += row.to(tl.float32) * weight
    tl.store(out + token * SIZE + columns, rounded(total, out.dtype.element_ty), mask=here)


def combine(y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sums [T, H] of the rows of `y` [S, H] (any row stride), each pair's at `places`."""
    tokens, top_k = weights.shape
    size = y.shape[1]
    if y.stride(1) != 1:
        y = y.contiguous()  # [S, H]
    out = torch.empty((tokens, size), dtype=y.dtype, device=y.device)  # [T, H]
    block = min(COLUMNS, next_power_of_2(size))
    launch(
        _combine,
        (tokens, cdiv(size, block)),
        (y, y.stride(0), places, weights, *weights.stride(), out),
        K=top_k,
        SIZE=size,
        COLS=block,
    )
    return out  # [T, H]
