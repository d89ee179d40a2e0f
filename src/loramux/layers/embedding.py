"""The embedding whose vocabulary is dealt out to the ranks."""

from __future__ import annotations

import torch
from torch import nn

from loramux.parallel import Group, Stripe


class ShardedEmbedding(nn.Module):
    """Token ids [...] -> [..., D], of which each rank holds the rows `rows` in `inner`, an embedding
    of any kind that gives nothing but multiples of its rows."""

    def __init__(self, inner: nn.Module, rows: Stripe, group: Group):
        super().__init__()
        self.inner = inner
        self._rows = rows
        self._group = group

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        local = ids - self._rows.start  # [...]
        away = (local < 0) | (local >= self._rows.size)  # [...]
        found = self.inner(local.masked_fill(away, 0))  # [..., D]
        return self._group.all_reduce(found.masked_fill(away.unsqueeze(-1), 0))  # [..., D]
