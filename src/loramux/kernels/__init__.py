"""The numeric ops of a step: one name each, an implementation per device, a twin in `reference`.

    lora_delta       y [T, N] += deltas of every token's adapters from x [T, in]
    write_kv         k, v [T, Hkv, D] -> slots of the paged cache
    paged_attention  q [T, H, D] over the paged cache -> [T, H, Dv]
    rms_norm, add_rms_norm, silu_mul, rope    glue that costs eager mode many small calls
    PackedLinear     a CPU linear with its weight in oneDNN's own order

Ops change only what their text says; `out` tensors are new and contiguous. An op picks its
implementation by the device of its first tensor; `loramux.kernels.reference` defines the result.
Set LORAMUX_CPU_KERNELS=reference to run the twins on the CPU.
"""

from __future__ import annotations

from loramux.kernels.arguments import AttentionBatch, LoRASite, NormMode, Segments
from loramux.kernels.dispatch import (
    OPS,
    add_rms_norm,
    lora_delta,
    paged_attention,
    rms_norm,
    rope,
    silu_mul,
    write_kv,
)
from loramux.kernels.packed_linear import PackedLinear

__all__ = [
    "OPS",
    "AttentionBatch",
    "LoRASite",
    "NormMode",
    "PackedLinear",
    "Segments",
    "add_rms_norm",
    "lora_delta",
    "paged_attention",
    "rms_norm",
    "rope",
    "silu_mul",
    "write_kv",
]
