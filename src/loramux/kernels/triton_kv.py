"""Keys and values into the blocks of the cache, on a GPU."""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels.triton_delta import rounded
from loramux.kernels.triton_launch import next_power_of_2


class Cache(NamedTuple):
    """A cache [num_blocks, block_size, Hkv, D] as a kernel takes it."""

    data: torch.Tensor
    block_stride: int
    slot_stride: int
    head_stride: int
    feature_stride: int


def as_cache(tensor: torch.Tensor) -> Cache:
    return Cache(tensor, *tensor.stride())


@triton.jit
def in_cache(cache, slots, head, BLOCK_SIZE: tl.constexpr):
    """Where a head's vectors stand, for each slot (those below 0 need a mask)."""
    slots = slots.to(tl.int64)
    at = slots // BLOCK_SIZE * cache.block_stride + slots % BLOCK_SIZE * cache.slot_stride
    return cache.data + at + head * cache.head_stride


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
    at = in_cache(cache, slot, head, BLOCK_SIZE)
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
        as_cache(k_cache),
        as_cache(v_cache),
        slots,
        heads,
        size,
        v.shape[2],
        k_cache.shape[1],
        next_power_of_2(heads),
        next_power_of_2(size),
        next_power_of_2(v.shape[2]),
    )
