"""The ops on an NVIDIA GPU: kernels in Triton, and the twins for what has none.

The kernels run on the current CUDA device, which must be the tensors' own.
"""

from __future__ import annotations

import torch

from loramux.kernels import triton_norm
from loramux.kernels.arguments import Expand, NormMode
from loramux.kernels.cuda_attention import paged_attention
from loramux.kernels.reference import lora_delta, rope
from loramux.kernels.triton_fused import gated, silu_mul, take_tokens
from loramux.kernels.triton_lora import lora_expand, lora_shrink
from loramux.kernels.triton_norm import rms_norm
from loramux.kernels.triton_rope import rope_kv, write_kv

__all__ = [
    "add_rms_norm",
    "gated",
    "lora_delta",
    "lora_expand",
    "lora_shrink",
    "paged_attention",
    "rms_norm",
    "rope",
    "rope_kv",
    "silu_mul",
    "take_tokens",
    "write_kv",
]

FEW_ROWS = 16
"""Chunks of decode steps have no more rows."""


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    mode: NormMode = "llama",
    post_weight: torch.Tensor | None = None,
    expand: Expand | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `loramux.kernels.add_rms_norm`; `x` may be written to.

    A norm needs a whole row in one program. With few rows few programs would have to load B alone
    (12 microseconds where the norm takes 2), so many expand first."""
    if expand is not None and expand.work.rows_per_chunk <= FEW_ROWS:
        lora_expand(x, expand)
        expand = None
    return triton_norm.add_rms_norm(x, residual, weight, eps, mode, post_weight, expand)
