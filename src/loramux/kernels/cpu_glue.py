"""The glue ops on the CPU: norms, rotations and gates, and those that do several at once."""

from __future__ import annotations

import torch

from loramux.kernels import reference
from loramux.kernels.arguments import Activation, Expand, NormMode
from loramux.kernels.cpu_library import DTYPES, holding

MODES: dict[str, int] = {"llama": 0, "plain": 1, "gemma": 2}


def _rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A tensor [..., D] as rows of unit step, and the step between rows in elements."""
    if tensor.dim() == 2 and tensor.stride(1) == 1:
        return tensor, tensor.stride(0)
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    return tensor, tensor.shape[-1]


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, mode: NormMode = "llama"
) -> torch.Tensor:
    """See `loramux.kernels.rms_norm`."""
    dtype = DTYPES.get(x.dtype)
    if dtype is None or weight.dtype != x.dtype or not weight.is_contiguous():
        return reference.rms_norm(x, weight, eps, mode)
    rows, stride = _rows(x)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)  # [..., D]
    size = weight.shape[0]
    holding.loramux_rms_norm(
        *(rows.data_ptr(), stride, None, 0, weight.data_ptr(), out.data_ptr(), None),
        *(x.numel() // size, size, eps, MODES[mode], dtype, torch.get_num_threads()),
    )
    return out


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    mode: NormMode = "llama",
    post_weight: torch.Tensor | None = None,
    expand: Expand | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `loramux.kernels.add_rms_norm`."""
    if expand is not None:
        return reference.add_rms_norm(x, residual, weight, eps, mode, post_weight, expand)
    if post_weight is not None:
        x = rms_norm(x, post_weight, eps, mode)  # [T, D]
    dtype = DTYPES.get(x.dtype)
    same = weight.dtype == x.dtype == residual.dtype and x.shape == residual.shape
    if dtype is None or not same or not weight.is_contiguous():
        return reference.add_rms_norm(x, residual, weight, eps, mode)
    (rows, stride), (others, other_stride) = _rows(x), _rows(residual)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)  # [..., D]
    total = torch.empty_like(out)  # [..., D]
    size = weight.shape[0]
    holding.loramux_rms_norm(
        *(rows.data_ptr(), stride, others.data_ptr(), other_stride),
        *(weight.data_ptr(), out.data_ptr(), total.data_ptr()),
        *(x.numel() // size, size, eps, MODES[mode], dtype, torch.get_num_threads()),
    )
    return out, total


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `loramux.kernels.silu_mul`."""
    dtype = DTYPES.get(gate.dtype)
    if dtype is None or up.dtype != gate.dtype or up.shape != gate.shape:
        return reference.silu_mul(gate, up)
    (gates, gate_stride), (ups, up_stride) = _rows(gate), _rows(up)
    out = torch.empty_like(gates, memory_format=torch.contiguous_format)  # [..., I]
    size = gate.shape[-1]
    holding.loramux_silu_mul(
        *(gates.data_ptr(), gate_stride, ups.data_ptr(), up_stride, out.data_ptr()),
        *(gate.numel() // size, size, dtype, torch.get_num_threads()),
    )
    return out


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """See `loramux.kernels.rope`."""
    dtype = DTYPES.get(q.dtype)
    q_strides, k_strides = q.stride(), k.stride()
    cos_strides, sin_strides = cos.stride(), sin.stride()
    same = q.dtype == k.dtype == cos.dtype == sin.dtype
    steps = q_strides[2] == k_strides[2] == cos_strides[1] == sin_strides[1] == 1
    if dtype is None or not same or not steps:
        return reference.rope(q, k, cos, sin)
    tokens, heads, _ = q.shape
    if cos.shape != sin.shape or cos.shape[0] != tokens or k.shape[0] != tokens:
        raise ValueError(f"rope: {tokens} tokens do not go with cos {tuple(cos.shape)}")
    holding.loramux_rope(
        *(q.data_ptr(), q_strides[0], q_strides[1], heads),
        *(k.data_ptr(), k_strides[0], k_strides[1], k.shape[1]),
        *(cos.data_ptr(), cos_strides[0], sin.data_ptr(), sin_strides[0]),
        *(tokens, cos.shape[1] // 2, dtype, torch.get_num_threads()),
    )
    return None


def gated(
    gate_up: torch.Tensor, activation: Activation = "silu", expand: Expand | None = None
) -> torch.Tensor:
    """See `loramux.kernels.gated`."""
    if expand is not None or activation != "silu":
        return reference.gated(gate_up, activation, expand)
    gate, up = gate_up.chunk(2, dim=-1)  # [T, I]
    return silu_mul(gate, up)  # [T, I]
