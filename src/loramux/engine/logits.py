"""Logits after a step's forward: where captured steps leave them, and the likeliest of each row."""

from __future__ import annotations

import torch
from torch import nn


class SharedLogits:
    """One place for the logits of all captured steps, which are read before the next replay.

    Each graph's own would stay as long as the graph: 600 MB for a vocabulary of 128,256."""

    def __init__(self, rows: int, size: int, dtype: torch.dtype, device: torch.device):
        self._place = torch.empty(rows, size, dtype=dtype, device=device)  # [B, V]

    @classmethod
    def of(
        cls, head: nn.Module, rows: int, dtype: torch.dtype, device: torch.device
    ) -> SharedLogits:
        """For the logits that `head` makes."""
        return cls(rows, int(head.out_features), dtype, device)  # type: ignore[arg-type]

    def first(self, rows: int) -> torch.Tensor | None:
        """The place of a step of so many rows [rows, V]; None for one row, whose product is a kernel
        of its own, and its logits small."""
        return None if rows == 1 else self._place[:rows]  # [rows, V]


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """argmax of each row of [B, V] -> [B], in two stages where few rows would not fill a GPU.

    On an H100, 128,256 tokens: 17 instead of 42 µs for 16 rows, 31 instead of 43 for 64, but 86
    instead of 55 for 256."""
    rows, size = logits.shape
    parts = next((n for n in range(512, 63, -1) if size % n == 0), 1)
    if logits.device.type != "cuda" or rows > 64 or parts == 1:
        return logits.argmax(dim=-1)  # [B]
    values, places = logits.view(rows, parts, size // parts).max(dim=-1)  # [B, parts]
    part = values.argmax(dim=-1, keepdim=True)  # [B, 1]
    return (part * (size // parts) + places.gather(1, part)).squeeze(1)  # [B]
