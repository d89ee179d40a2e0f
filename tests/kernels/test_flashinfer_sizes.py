"""What of the FlashInfer planner can be wrong without a GPU: windows, refusals, workspace sizes."""

from __future__ import annotations

import pytest
import torch

from loramux.kernels.flashinfer_attention import available, window_left
from loramux.kernels.flashinfer_sizes import Shape


@pytest.mark.parametrize("window", [0, 1, 2, 128])
def test_a_window_counts_the_querys_own_position(window: int) -> None:
    """FlashInfer lets a query at p see position k if k + window_left >= p, and all if it is -1."""
    left, own = window_left(window), 300
    seen = [k for k in range(own + 1) if left == -1 or k + left >= own]
    assert len(seen) == (window or own + 1)


def test_what_flashinfer_does_not_take() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert "96" in (available(96, 96, torch.bfloat16, cuda) or "")
    assert "64" in (available(128, 64, torch.bfloat16, cuda) or "")
    assert "float32" in (available(128, 128, torch.float32, cuda) or "")
    assert available(128, 128, torch.bfloat16, cpu) is not None


def _tile(rows: int, head_dim: int) -> int:
    """Rows of FA2's tiles, by the average of packed rows of a sequence."""
    if rows > 64 and head_dim < 256:
        return 128
    return 64 if rows > 16 else 16


@pytest.mark.parametrize("heads", [(32, 8), (64, 8), (8, 8), (16, 1), (40, 2), (128, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("batch", [1, 17, 256, 512])
def test_workspaces_hold_the_lists_and_partial_results(
    heads: tuple[int, int], head_dim: int, batch: int
) -> None:
    """By the layouts in FlashInfer's scheduler: it raises in the middle of a step if one is short."""
    sms = 132
    shape = Shape(*heads, head_dim, batch, 1024, sms)
    pieces = 2 * sms // heads[1]
    tile = _tile(shape.group, head_dim)
    tiles = max(pieces, -(-batch * shape.group // tile) + batch - 1)
    assert shape.float_bytes() >= heads[0] * tiles * tile * (head_dim + 1) * 4
    assert shape.decode_bytes() >= 13 * tiles + 8 * (batch + 1) + 6 * 16
    # A captured step of 1,024 rows, whose work is not cut: three words a tile.
    whole = max(pieces, -(-1024 * shape.group // tile) + 1023)
    assert shape.decode_bytes() >= 12 * whole + 4 * 1025 + 6 * 16
    for queries in (1, 5, 60, 129, 1000):
        rows, packed = batch * queries, queries * shape.group
        tile = _tile(packed, head_dim)
        tiles = max(pieces, batch * -(-packed // tile))
        fa2 = 13 * tiles + 4 * (batch + rows + 2) + 6 * 16
        works = batch * -(-queries // (192 if head_dim == 64 else 128)) * heads[0]
        fa3 = 28 * works + 4 * (sms + 1) + 8 * 16
        assert shape.prefill_bytes(batch, rows) >= max(fa2, fa3)
        if tiles == pieces:  # split, so that there are partial results
            assert shape.float_bytes() >= heads[0] * pieces * tile * (head_dim + 1) * 4
