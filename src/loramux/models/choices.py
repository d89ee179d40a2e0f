"""Comparing models that choose experts: both sides have to choose the same.

What differs by rounding alone may give a token to another expert, and then all of it differs. So the
choices of one run are kept, and the other run is made to repeat them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from loramux.layers.experts import Choice

OWN_NAME = "loramux_own"


class Choices:
    """The experts that the tokens of a run were given to, by layer, with their weights."""

    def __init__(self, model: PreTrainedModel):
        self._modules: list[Any] = [m for m in model.modules() if hasattr(m, "loramux_experts")]
        self._kept: list[Choice] = []
        ALL_EXPERTS_FUNCTIONS.register(OWN_NAME, _own_forward)

    def __bool__(self) -> bool:
        return bool(self._modules)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep those of the steps that run meanwhile, each layer's one after the other."""
        for module in self._modules:
            module.loramux_experts.seen = []
        try:
            yield
        finally:
            seen = [module.loramux_experts.seen for module in self._modules]
            for module in self._modules:
                module.loramux_experts.seen = None
        self._kept = [
            (torch.cat([c for c, _ in steps]), torch.cat([w for _, w in steps])) for steps in seen
        ]

    @contextmanager
    def repeated(self, *, own: bool = False) -> Iterator[None]:
        """Let the tokens of all those steps, run at once, go where they went. With `own` the model
        computes with its own experts, where its weights are as it knows them."""
        before = [module.config._experts_implementation for module in self._modules]
        for module, choice in zip(self._modules, self._kept, strict=True):
            module.loramux_experts.forced = choice
            if own and module.is_concatenated:
                module.config._experts_implementation = OWN_NAME
        try:
            yield
        finally:
            for module, name in zip(self._modules, before, strict=True):
                module.loramux_experts.forced = None
                module.config._experts_implementation = name


def _own_forward(
    module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    if hasattr(module, "loramux_experts"):
        chosen, weights = module.loramux_experts.forced
    own: Callable[..., torch.Tensor] = type(module).forward.__wrapped__
    return own(module, hidden, chosen, weights)
