"""transformers' `Conv1D`, a linear layer that holds its weight as [in, out], as an ordinary one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def conv1d_layers(model: PreTrainedModel) -> Iterator[tuple[str, Conv1D]]:
    """Those of GPT-2 and its like, by name."""
    for name, module in model.named_modules():
        if type(module) is Conv1D:
            yield name, module


def replace_conv1d(model: PreTrainedModel) -> frozenset[str]:
    """Put an nn.Linear with the transposed weight in the place of every `Conv1D`; their names."""
    found = list(conv1d_layers(model))
    for name, layer in found:
        model.set_submodule(name, _as_linear(layer))
    return frozenset(name for name, _ in found)


def _as_linear(layer: Conv1D) -> nn.Linear:
    linear = nn.Linear(layer.nx, layer.nf, bias=layer.bias is not None, device="meta")
    turned = layer.weight.detach().t().contiguous()  # [out, in]
    linear.weight = nn.Parameter(turned, requires_grad=False)
    if layer.bias is not None:
        linear.bias = layer.bias
    return linear
