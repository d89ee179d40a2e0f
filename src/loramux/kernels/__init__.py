"""The numeric ops of a step: one name each, an implementation per device, a twin in `reference`.

    lora_delta       y [T, N] += deltas of every token's adapters from x [T, in]
    lora_shrink, lora_expand    its two halves over a work list, for GPUs
    write_kv         k, v [T, Hkv, D] -> slots of the paged cache
    paged_attention  q [T, H, D] over the paged cache -> [T, H, Dv]
    rms_norm, add_rms_norm, silu_mul, rope    glue that costs eager mode many small calls
    rope_kv, gated, add_rms_norm    the same with a shrunk LoRA delta folded in (`Expand`)
    linear           x [T, K] times a weight and a bias; a GPU has its own for one row
    take_tokens      a step's input ids, those of the step before among them
    route            each token's experts [T, K] -> the order in which they are computed
    take_rows, combine    x [T, H] into that order, and the weighted sum of its rows back
    grouped_linear   rows [S, in], sorted by expert, times their experts' weights
    PackedLinear     a CPU linear with its weight in oneDNN's own order

Ops change only what their text says; `out` tensors are new and contiguous. An op picks its
implementation by the device of its first tensor; `loramux.kernels.reference` defines the result.
Set LORAMUX_CPU_KERNELS=reference to run the twins on the CPU.
"""

from __future__ import annotations

from loramux.kernels.arguments import (
    AFFINE,
    ONE_PLACE,
    Activation,
    AttentionBatch,
    Expand,
    LoRASite,
    NormMode,
    Routing,
    Segments,
    WorkList,
)
from loramux.kernels.dispatch import (
    OPS,
    add_rms_norm,
    combine,
    gated,
    grouped_linear,
    linear,
    lora_delta,
    lora_expand,
    lora_shrink,
    paged_attention,
    rms_norm,
    rope,
    rope_kv,
    route,
    shrink_parts,
    silu_mul,
    take_rows,
    take_tokens,
    write_kv,
)
from loramux.kernels.packed_linear import PackedLinear

__all__ = [
    "AFFINE",
    "ONE_PLACE",
    "OPS",
    "Activation",
    "AttentionBatch",
    "Expand",
    "LoRASite",
    "NormMode",
    "PackedLinear",
    "Routing",
    "Segments",
    "WorkList",
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
    "shrink_parts",
    "silu_mul",
    "take_rows",
    "take_tokens",
    "write_kv",
]
