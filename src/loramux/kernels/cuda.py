"""The ops on an NVIDIA GPU: kernels in Triton, and the twins for what has none.

The kernels run on the current CUDA device, which must be the tensors' own.
"""

from __future__ import annotations

from loramux.kernels.cuda_attention import paged_attention
from loramux.kernels.reference import lora_delta, rope
from loramux.kernels.triton_experts import combine, take_rows
from loramux.kernels.triton_fused import gated, silu_mul, take_tokens
from loramux.kernels.triton_gemv import linear
from loramux.kernels.triton_grouped import grouped_linear
from loramux.kernels.triton_kv import write_kv
from loramux.kernels.triton_lora import lora_expand
from loramux.kernels.triton_norm import add_rms_norm, rms_norm
from loramux.kernels.triton_rope import rope_kv
from loramux.kernels.triton_route import route
from loramux.kernels.triton_shrink import lora_shrink

__all__ = [
    "add_rms_norm",
    "combine",
    "gated",
    "grouped_linear",
    "linear",
    "lora_delta",
    "lora_expand",
    "lora_shrink",
    "paged_attention",
    "rms_norm",
    "rope",
    "rope_kv",
    "route",
    "silu_mul",
    "take_rows",
    "take_tokens",
    "write_kv",
]
