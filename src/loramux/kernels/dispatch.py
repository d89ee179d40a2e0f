"""The ops as the layers call them: each looks up the implementation for its tensors' device."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch

from loramux.kernels import reference
from loramux.kernels.arguments import AttentionBatch, LoRASite, NormMode, Segments

OPS = (
    "lora_delta",
    "write_kv",
    "paged_attention",
    "rms_norm",
    "add_rms_norm",
    "silu_mul",
    "rope",
)


class Backend(Protocol):
    """What a module of implementations provides; `reference` says what each op means."""

    def lora_delta(
        self, y: torch.Tensor, x: torch.Tensor, site: LoRASite, segments: Segments, /
    ) -> None: ...

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots: torch.Tensor,
        /,
    ) -> None: ...

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: AttentionBatch,
        scaling: float,
        window: int = 0,
        softcap: float = 0.0,
        /,
    ) -> torch.Tensor: ...

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, mode: NormMode = "llama", /
    ) -> torch.Tensor: ...

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        mode: NormMode = "llama",
        /,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor, /) -> torch.Tensor: ...

    def rope(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, /
    ) -> None: ...


@cache
def backend(device: torch.device) -> Backend:
    """The best implementation for `device`; the twins where there is no better one."""
    if device.type == "cpu":
        try:
            from loramux.kernels import cpu
        except ImportError:
            return reference
        return cpu
    return reference


def lora_delta(y: torch.Tensor, x: torch.Tensor, site: LoRASite, segments: Segments) -> None:
    """Add to `y` [T, N] in place, for every token in a segment, the sum over its members of
    member_scale * row_scale[s, p] * (x[t] @ a[s, p:p+r]^T) @ b[p:p+r, columns of s].

    `x` [T, in] and `y` have one dtype and any row stride; rows in no segment keep their bits.
    """
    if segments.num_segments:
        backend(y.device).lora_delta(y, x, site, segments)


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Store `k` [T, Hkv, D], `v` [T, Hkv, Dv] (last dim contiguous) at `slots` [T] int64 of the
    caches [num_blocks, block_size, Hkv, D or Dv]; slot = block * block_size + offset."""
    backend(k.device).write_kv(k, v, k_cache, v_cache, slots)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Causal attention of `q` [T, H, D] over cached positions -> [T, H, Dv].

    `window` > 0: only the last `window` positions, the query's own included. `softcap` > 0:
    scores s become softcap * tanh(s / softcap). Head h reads KV head h // (H // Hkv).
    """
    return backend(q.device).paged_attention(q, k_cache, v_cache, batch, scaling, window, softcap)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, mode: NormMode = "llama"
) -> torch.Tensor:
    """RMS norm over the last dim: `x` [..., D], `weight` [D] -> [..., D]."""
    return backend(x.device).rms_norm(x, weight, eps, mode)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    mode: NormMode = "llama",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x`, `residual` [..., D] -> (rms_norm(residual + x), residual + x)."""
    return backend(x.device).add_rms_norm(x, residual, weight, eps, mode)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(`gate`) * `up`: [T, I], [T, I] (any row stride) -> [T, I]."""
    return backend(gate.device).silu_mul(gate, up)


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate `q` [T, H, D] and `k` [T, Hkv, D] in place by `cos`, `sin` [T, rot], rot <= D."""
    backend(q.device).rope(q, k, cos, sin)
