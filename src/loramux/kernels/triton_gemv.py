"""The product of one row with a weight, on a GPU: all there is to do is to read the weight.

Libraries reach 2.6 to 4.1 TB/s there on an H200, depending on the shape; this 3.5 to 4.5.
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels import reference
from loramux.kernels.triton_delta import rounded
from loramux.kernels.triton_launch import cdiv, launch, next_power_of_2, wait

ROWS, STEP, WARPS = 2, 2048, 4
"""Rows of the weight a program reads, and how much of each at a time."""


@triton.jit
def _tile(at, live, low: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr):
    """Columns from `low` of the weight's rows at `at` [ROWS, 1]: [ROWS, STEP]."""
    inputs = low + tl.arange(0, STEP)
    mask = live[:, None] & (inputs < SIZE)[None, :]
    return tl.load(at + inputs[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["count"])
def _gemv(
    x, weight, weight_stride, bias, y, count,
    SIZE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < count
    at = weight + rows.to(tl.int64)[:, None] * weight_stride
    total = tl.zeros((ROWS, STEP), tl.float32)
    following = _tile(at, live, 0, SIZE, STEP)  # needs nobody's result
    wait(EARLY)
    for low in tl.static_range(0, SIZE, STEP):
        right = following
        if low + STEP < SIZE:
            following = _tile(at, live, low + STEP, SIZE, STEP)
        inputs = low + tl.arange(0, STEP)
        left = tl.load(x + inputs, mask=inputs < SIZE, other=0.0).to(tl.float32)  # [STEP]
        total += right.to(tl.float32) * left[None, :]
    result = tl.sum(total, 1)  # [ROWS]
    if bias is not None:
        result += tl.load(bias + rows, mask=live, other=0.0).to(tl.float32)
    tl.store(y + rows, rounded(result, y.dtype.element_ty), mask=live)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x` [T, K] times `weight` [N, K] transposed, plus `bias` [N] -> [T, N], in `out` if given."""
    if x.shape[0] != 1 or x.stride(1) != 1 or weight.stride(1) != 1:
        return reference.linear(x, weight, bias, out)  # [T, N]
    count, size = weight.shape
    y = x.new_empty(1, count) if out is None else out  # [1, N]
    step = min(STEP, next_power_of_2(size))
    grid = (cdiv(count, ROWS),)
    launch(
        _gemv,
        grid,
        (x, weight, weight.stride(0), bias, y, count),
        SIZE=size,
        ROWS=ROWS,
        STEP=step,
        num_warps=WARPS,
    )
    return y
