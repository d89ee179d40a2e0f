"""A linear layer on the CPU whose weight lies in the order that oneDNN's matmul wants.

Packing once at load saves the reordering (or the slow path around it) that F.linear pays at every
call. Only the packed copy is kept.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


class PackedLinear:
    """y = x @ weight^T + bias for `weight` [N, K] on the CPU; `weight` may be freed afterwards."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.bias = bias
        packed = _pack(weight.detach()) if _packs(weight) else None
        self.is_packed = packed is not None
        self._weight = weight.detach() if packed is None else packed

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N], in the weight's dtype."""
        if not self.is_packed:
            return F.linear(x, self._weight, self.bias)  # [..., N]
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self.bias, "none", [], ""
        )
        return result  # [..., N]

    @property
    def weight_nbytes(self) -> int:
        """Bytes of the weight as held (packing pads by a few at most)."""
        return self.out_features * self.in_features * self.dtype.itemsize

    def dense(self) -> torch.Tensor:
        """The weight as it was given, [N, K]; a copy if it was packed."""
        return self._weight.to_dense() if self.is_packed else self._weight  # [N, K]


def _packs(weight: torch.Tensor) -> bool:
    """Whether packing this weight works here and pays."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    # Float16 is refused by `_pack` on processors without float16 arithmetic.
    return weight.dtype in (torch.float32, torch.float16)


def _pack(weight: torch.Tensor) -> torch.Tensor | None:
    """The packed weight, or None if oneDNN refuses it."""
    try:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    except RuntimeError:
        return None
    return packed
