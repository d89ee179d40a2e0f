"""One head on a GPU: normed, rotated, and stored among the queries or in the cache."""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels.triton_delta import rounded
from loramux.kernels.triton_kv import in_cache
from loramux.kernels.triton_norm import normed


class Heads(NamedTuple):
    """What becomes of the heads, as a kernel takes it."""

    table: torch.Tensor  # [P, rot]
    table_stride: int
    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T]
    q: torch.Tensor  # [T, H, D]
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    eps: float


@triton.jit
def _normed_part(
    value, inverse, weight, low, SIZE: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr,
    dtype: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    inside = tl.arange(0, BLOCK)
    factor = tl.load(weight + low + inside, mask=inside < SIZE, other=0.0)[None, :]
    return rounded(normed(value, inverse, factor, MODE, dtype), wide).to(tl.float32)


@triton.jit
def angles_at(heads, position, live, HALF: tl.constexpr, BLOCK: tl.constexpr):
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
def finish_head(
    low, high, rest, head, rows, live, angles, slot, heads, k_cache, v_cache,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    MODE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Norm, turn and store a head of queries or of keys; store a head of values."""
    q = heads.q
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
            at = in_cache(k_cache, slot, head - HEADS, BLOCK_SIZE)
            stride = k_cache.feature_stride
            _store_head(at, stride, low, high, rest, kept, D, HALF, HALF_BLOCK, REST_BLOCK)
        else:
            at = in_cache(v_cache, slot, head - HEADS - KV_HEADS, BLOCK_SIZE)
            stride = v_cache.feature_stride
            _store_head(at, stride, low, high, rest, kept, D, HALF, HALF_BLOCK, REST_BLOCK)
