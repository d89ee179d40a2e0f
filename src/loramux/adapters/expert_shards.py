"""What one rank needs of an adapter's experts, side by side: as `shards.py`, for every expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from loramux.adapters.weights import AdapterWeights, StoredExperts, StoredFactor
from loramux.parallel import Cut

ALIGNMENT = 16  # bytes from one matrix to the next

Factors = tuple[torch.Tensor, torch.Tensor]
"""A [r, in] and B [out, r] of one expert."""

Piece = tuple[int, torch.Tensor]
"""Where a matrix goes in the new buffer, and the matrix."""


def own_experts(
    weights: AdapterWeights, cuts: Mapping[str, Cut], end: int
) -> tuple[dict[str, StoredExperts], list[Piece], int]:
    """The columns of A and the rows of B of this rank, from byte `end` of a buffer on; and its new end.
    Where rows of A are dealt out, A is left away."""

    def keep(name: str, a: torch.Tensor, b: torch.Tensor) -> Factors:
        cut = cuts[name]
        columns = cut.input.slice if cut.deal == 1 else slice(0, 0)
        return a[:, columns], _rows_of(name, cut, b)

    return _pack(weights, keep, end)


def dealt_experts(
    weights: AdapterWeights, cuts: Mapping[str, Cut], rank: int, end: int
) -> tuple[dict[str, StoredExperts], list[Piece], int]:
    """The rows of A that are dealt out to this rank, without B."""

    def keep(name: str, a: torch.Tensor, b: torch.Tensor) -> Factors | None:
        deal = cuts[name].deal
        return (a[rank::deal], b[:0, rank::deal]) if deal > 1 else None

    return _pack(weights, keep, end)


def _rows_of(name: str, cut: Cut, b: torch.Tensor) -> torch.Tensor:
    """This rank's rows of B [out, r]; of gate and up in one its rows of each."""
    if not name.endswith(".gate_up_proj"):
        return b[cut.b_output.slice]
    halves = b.reshape(2, -1, b.shape[1])  # [2, out, r]
    return halves[:, cut.b_output.slice].reshape(-1, b.shape[1])  # [2 out', r]


def _pack(
    weights: AdapterWeights,
    keep: Callable[[str, torch.Tensor, torch.Tensor], Factors | None],
    end: int,
) -> tuple[dict[str, StoredExperts], list[Piece], int]:
    packed: dict[str, StoredExperts] = {}
    pieces: list[Piece] = []
    for name, stored in weights.layout.experts.items():
        count = len(stored.r)
        offsets = np.zeros((2, count), np.int64)
        widths = np.ones((2, count), np.int64)  # elements between rows
        r = np.zeros(count, np.int32)
        shape: tuple[int, int] | None = None
        for expert, a, b, _ in stored.views(weights.buffer):
            if (kept := keep(name, a, b)) is None:
                break
            r[expert], shape = len(kept[0]), (kept[0].shape[1], len(kept[1]))
            for half, matrix in enumerate(kept):
                offsets[half, expert], widths[half, expert] = end, max(1, matrix.shape[1])
                pieces.append((end, matrix))
                end += -(-matrix.numel() * matrix.element_size() // ALIGNMENT) * ALIGNMENT
        if shape is not None:
            ones = np.ones(count, np.int64)
            packed[name] = StoredExperts(
                StoredFactor(offsets[0], widths[0], ones, stored.a.dtype),
                StoredFactor(offsets[1], widths[1], ones, stored.b.dtype),
                *(r, stored.scales, *shape),
            )
    return packed, pieces, end
