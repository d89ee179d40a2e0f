"""Routers that multiply by a bare parameter, with adapters on that product.

A router of transformers is no linear layer: its forward calls F.linear with its own `weight`, chooses
experts out of what comes, and is different in every family. Its weight is replaced by a tensor that
answers this one call through a `MergedLinear`; everything else is done with it as before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from loramux.layers.batch import StepBatch
from loramux.layers.linear import MergedLinear

CASTS = (torch.Tensor.to, torch.Tensor.type, torch.Tensor.float)


class RouterLinear(MergedLinear):
    """The product of one router, in the type in which the router computes it."""

    takes_rows = False  # under a weight that may have another type

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, batch: StepBatch):
        out_features, in_features = weight.shape
        plain = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach(), requires_grad=False)
        super().__init__([plain], batch)

    def pack(self) -> None:
        """A router is small, and reads its weight in a type of its own."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]."""
        assert self.weight is not None
        if self.weight.dtype != x.dtype:  # at the first call
            self.weight = self.weight.to(x.dtype)  # [N, K]
            self.bias = None if self.bias is None else self.bias.to(x.dtype)  # [N]
            self.dtype = x.dtype
        return self._compute(x)


class RouterWeight(torch.Tensor):
    """A router's weight [E, H], of which F.linear is answered by `linear`."""

    linear: RouterLinear

    @classmethod
    def of(cls, weight: torch.Tensor, linear: RouterLinear) -> RouterWeight:
        made: RouterWeight = torch.Tensor._make_subclass(cls, weight.detach())
        made.linear = linear
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) > 1 and isinstance(args[1], cls):
            return args[1].linear.product(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if func in CASTS and isinstance(args[0], cls):  # before the product
            return cls.of(result, args[0].linear)
        return result
