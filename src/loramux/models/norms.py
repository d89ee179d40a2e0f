"""RMS norms in one call instead of seven, where they provably compute the same.

A norm is replaced only after it and the replacement have agreed on random input: families differ in
where they round and whether they add one to the weight.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from loramux.kernels import NormMode, rms_norm

logger = logging.getLogger(__name__)

MODES: tuple[NormMode, ...] = ("llama", "gemma", "plain")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class FusedRMSNorm(nn.Module):
    """[..., D] -> [..., D] with the weight and rounding of the norm it replaces."""

    def __init__(self, weight: torch.Tensor, eps: float, mode: NormMode):
        super().__init__()
        # A copy: the original may be a piece of a mapped file, which it would keep in memory.
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.eps = eps
        self.mode = mode
        self._weight = self.weight.data  # nn.Module looks parameters up slowly

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self._weight, self.eps, self.mode)


def fuse_norms(model: nn.Module) -> int:
    """Replace every RMS norm of `model` that agrees with a mode of ours; how many were."""
    modes: dict[type[nn.Module], NormMode | None] = {}
    # Some models keep the weights of their norms wider than what these are given.
    dtype = getattr(model, "dtype", None)
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not _looks_like_one(child):
                continue
            kind = type(child)
            if kind not in modes:
                modes[kind] = _agreeing_mode(child, dtype)
                if modes[kind] is None:
                    logger.info("%s keeps its own forward", kind.__name__)
            mode = modes[kind]
            if mode is not None:
                setattr(parent, name, FusedRMSNorm(_weight(child), _eps(child), mode))
                count += 1
    return count


def _looks_like_one(module: nn.Module) -> bool:
    return (
        type(module).__name__.endswith("RMSNorm")
        and [name for name, _ in module.named_parameters()] == ["weight"]
        and _weight(module).ndim == 1
        and _weight(module).device.type != "meta"
        and _eps(module) > 0
    )


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _eps(module: nn.Module) -> float:
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return 0.0


@torch.no_grad()
def _agreeing_mode(module: nn.Module, dtype: torch.dtype | None = None) -> NormMode | None:
    """The mode that computes what `module` computes of input in `dtype`, by default that of its weight,
    found with weights of its own."""
    weight = _weight(module)
    dtype = dtype or weight.dtype
    generator = torch.Generator().manual_seed(0)
    kept = weight.detach().clone()
    weight.copy_(torch.randn(weight.shape, generator=generator))  # else ones hide the mode
    x = torch.randn(5, weight.shape[0], generator=generator).to(weight.device, dtype) * 3  # [5, D]
    try:
        expected = module(x)  # [5, D]
        errors: dict[NormMode, float] = {}
        for mode in MODES:
            got = rms_norm(x, weight, _eps(module), mode)  # [5, D]
            error = float((got.float() - expected.float()).norm() / expected.float().norm())
            same = (got.shape, got.dtype) == (expected.shape, expected.dtype)
            if same and error <= TOLERANCE.get(dtype, 0.0):
                errors[mode] = error
    except (RuntimeError, TypeError, ValueError):
        return None
    finally:
        weight.copy_(kept)
    # Where a norm rounds is less than what is allowed: the closest mode is the one.
    return min(errors, key=errors.__getitem__, default=None)
