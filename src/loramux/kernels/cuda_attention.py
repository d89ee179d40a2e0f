"""Paged attention on CUDA: FlashInfer where the step carries its plan, else Triton.

FlashInfer's plans are of causal attention. A step with `last_keys` carries none, but real block tables.
"""

from __future__ import annotations

import torch

from loramux.kernels import triton_attention
from loramux.kernels.arguments import AttentionBatch
from loramux.kernels.flashinfer_attention import FlashInferPlanner

PLANNER = "flashinfer"
"""Where in `AttentionBatch.notes` the planner is whose plan is this step's."""


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`q` [T, H, D] over the caches [num_blocks, block_size, Hkv, D or Dv] -> [T, H, Dv]."""
    planner: FlashInferPlanner | None = batch.notes.get(PLANNER)
    kind = (scaling, window, softcap)
    if planner is not None and planner.covers(kind):
        assert sinks is None, "a model with sinks has no planner. This is a bug."
        assert batch.last_keys is None, "a step with last_keys has no plan. This is a bug."
        return planner.run(q, k_cache, v_cache, kind)  # [T, H, D]
    return triton_attention.paged_attention(
        q, k_cache, v_cache, batch, scaling, window, softcap, sinks
    )  # [T, H, Dv]
