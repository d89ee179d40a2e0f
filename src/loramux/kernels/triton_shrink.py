"""Shrink of LoRA on a GPU: the adapters' A rows against each token's input.

A grid depends on shapes alone, see `triton_delta`.
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels.arguments import LoRASite, WorkList
from loramux.kernels.triton_delta import (
    LARGE_CHUNK,
    MATRIX_ROWS,
    chunk_of,
    member_after,
    packed,
    product,
    programs,
    rounded,
)
from loramux.kernels.triton_launch import cdiv, launch, next_power_of_2, wait

FEATURES = 128
"""How much of the input one step of a shrink takes, for `FEW_PLACES`; half of it for more."""

FEW_PLACES, PLACES = 64, 128
"""Columns of a product, each a rank of a slice: the input is read once for `PLACES` of them."""

MOST_SHARES = 16
"""Programs that share the ranks of a chunk at most."""

TILE = 4096
"""Numbers of a tile of `h` for 4 warps: with more, registers would spill."""


@triton.jit
def _shrink(
    x, x_stride, order, a, a_slice_stride, a_row_stride, lora, TOP_K: tl.constexpr,
    WIDTH: tl.constexpr, SLICES: tl.constexpr, SPREAD: tl.constexpr, PARTS: tl.constexpr,
    SHARES: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    # All parts take the same number of whole steps; the last ones may find nothing left.
    SPAN: tl.constexpr = (WIDTH + STEP * PARTS - 1) // (STEP * PARTS) * STEP
    begin = tl.load(lora.counts) * PARTS * SHARES
    end = tl.load(lora.counts + 1) * PARTS * SHARES
    wait(EARLY)
    # RANKS ranks of all slices at once, so that x is read once: rank k of slice s is column
    # k * SPREAD + s of a product.
    places = tl.arange(0, RANKS * SPREAD)
    s = places % SPREAD
    for item in range(begin + tl.program_id(0), end, tl.num_programs(0)):
        chunk = chunk_of(lora, item // (PARTS * SHARES))
        part, share = item // SHARES % PARTS, item % SHARES
        rows = chunk[0] + tl.arange(0, ROWS)
        row_mask = rows < chunk[1]
        taken = rows
        if order is not None:
            taken = tl.load(order + rows, mask=row_mask, other=0) // TOP_K
        x_rows = x + taken.to(tl.int64)[:, None] * x_stride
        p, column, bound = chunk[4], chunk[5], chunk[7]
        for member in range(chunk[2], chunk[3]):
            r = tl.load(lora.row_r + s * lora.pool_rows + p, mask=s < SLICES, other=0)
            r = tl.minimum(r, bound)  # [RANKS SPREAD]
            for k in range(share * RANKS, tl.max(r, 0), SHARES * RANKS):
                ranks = k + places // SPREAD
                live = ranks < r
                a_rows = a + s.to(tl.int64) * a_slice_stride
                a_rows += (p + ranks).to(tl.int64) * a_row_stride
                total = tl.zeros((ROWS, RANKS * SPREAD), tl.float32)
                for low in range(part * SPAN, tl.minimum((part + 1) * SPAN, WIDTH), STEP):
                    inputs = low + tl.arange(0, STEP)
                    here = (inputs < WIDTH)[None, :]
                    left = tl.load(
                        x_rows + inputs[None, :], mask=row_mask[:, None] & here, other=0.0
                    )
                    right = tl.load(
                        a_rows[:, None] + inputs[None, :], mask=live[:, None] & here, other=0.0
                    )
                    left = rounded(left, a.dtype.element_ty)  # [ROWS, STEP]
                    total += product(left, tl.trans(right))
                at = lora.h + part * lora.part_stride + rows.to(tl.int64)[:, None] * lora.row_stride
                at += ((column + ranks) * SLICES + s)[None, :]
                mask = row_mask[:, None] & live[None, :]
                tl.store(at, rounded(total, lora.h.dtype.element_ty), mask=mask)
            p, column, _scale, bound, _affine = member_after(lora, p, member, chunk[3])


def ranks_at_once(rows: int, columns: int, spread: int, experts: int) -> int:
    """Ranks of a product whose `h` has so many columns a slice, `spread` of them side by side. Captured
    graphs have columns for the largest adapters, whichever are in the step: 16 do there."""
    if rows <= LARGE_CHUNK or experts > 1:
        return 16
    return max(16, min(PLACES // spread, 1 << (columns - 1).bit_length()))


def rank_shares(rows: int, columns: int, ranks: int) -> int:
    """Programs that share the ranks of a chunk, `ranks` of them at once. In captured steps all there may
    be: there are programs to spare, and one after the other would take as many times as long."""
    return 1 if rows > LARGE_CHUNK else max(1, min(MOST_SHARES, cdiv(columns, ranks)))


def lora_shrink(
    x: torch.Tensor,
    site: LoRASite,
    work: WorkList,
    h: torch.Tensor,
    order: torch.Tensor | None = None,
    top_k: int = 1,
) -> None:
    """Fill `h` [P, T, W] with P partial sums over the features of x [T, in] @ A^T; of the rows of `x`
    that `order` [S] // `top_k` names, if that is given."""
    a, parts, rows = site.a, h.shape[0], max(MATRIX_ROWS, work.rows_per_chunk)
    slices, _, width = a.shape
    spread = next_power_of_2(slices)
    columns = h.shape[2] // slices
    ranks = ranks_at_once(rows, columns, spread, site.experts)
    shares = rank_shares(rows, columns, ranks)
    launch(
        _shrink,
        programs(work.max_chunks * parts * shares, x.device),
        (x, x.stride(0), order, a, a.stride(0), a.stride(1)),
        packed(site, h, work),
        TOP_K=top_k,
        WIDTH=width,
        SLICES=slices,
        SPREAD=spread,
        PARTS=parts,
        SHARES=shares,
        RANKS=ranks,
        ROWS=rows,
        STEP=FEATURES if ranks * spread <= FEW_PLACES else FEATURES // 2,
        num_warps=4 if rows * ranks * spread <= TILE else 8,
        num_stages=3,
    )
