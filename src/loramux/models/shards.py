"""Cutting a model that has no weights yet to what one rank holds, by the model's own `tp_plan`.

The linear layers, attention sinks and the embedding become narrower, on the meta device; what of each
weight the rank has to read is written down in `Shards`. The model's own forward still runs: heads are
counted from the width of a projection, and the layers that replace these do what crosses ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from loramux.config import LoRAConfig
from loramux.errors import UnsupportedModel
from loramux.layers.embedding import ShardedEmbedding
from loramux.models.conv1d import conv1d_layers
from loramux.parallel import STYLES, Cut, Group, Stripe, all_of, cut_linear, stripe

EXPERTS_STYLE = "moe_tp_experts"
EXPERT_STYLES = {"gate_up_proj": "packed_colwise", "down_proj": "rowwise", "": EXPERTS_STYLE}
"""How a plan must cut the parameters of experts, and what it calls their module."""

INNER = ".inner."  # what a ShardedEmbedding adds to the names of parameters


@dataclass(frozen=True, slots=True)
class Part:
    """What of a parameter of the checkpoint one rank holds: its stripe of each dimension."""

    stripes: tuple[Stripe, ...]

    also: tuple[int, Stripe] | None = None
    """A dimension of which there are more places here, behind those of its stripe: of `up`, which
    stands behind `gate`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return tuple(stripe.whole for stripe in self.stripes)

    @property
    def index(self) -> tuple[slice, ...]:
        return tuple(stripe.slice for stripe in self.stripes)

    def take(self, whole: Any) -> torch.Tensor:
        """Out of a tensor, or of something that is read by the same index."""
        first: torch.Tensor = whole[self.index]
        if self.also is None:
            return first
        dim, stripe = self.also
        index = tuple(stripe.slice if i == dim else at for i, at in enumerate(self.index))
        return torch.cat((first, whole[index]), dim)


@dataclass(frozen=True, slots=True)
class Shards:
    """One rank's parts: `cuts` by the name of a linear layer, `parts` by the name of a parameter.
    What is not named is whole."""

    group: Group
    fully: bool = False
    cuts: dict[str, Cut] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)


def cut_model(model: PreTrainedModel, group: Group, lora: LoRAConfig | None) -> Shards:
    """Narrow `model`, which is on the meta device, in place. Raises UnsupportedModel with every layer
    that cannot be cut."""
    shards = Shards(group, bool(lora and lora.fully_sharded_loras))
    if group.size == 1:
        return shards
    if conv1d := {name.rpartition(".")[2] for name, _ in conv1d_layers(model)}:
        names = ", ".join(sorted(conv1d))
        raise _refusal(model, group, [f"its layers {names} are Conv1D, which are not cut yet"])
    plan = model.tp_plan or {}
    if not any(style.startswith("colwise") for name, style in plan.items() if "*" in name):
        raise _refusal(model, group, ["it has no tp_plan for its layers"])
    tied = model.get_output_embeddings()
    tied = tied if getattr(tied, "weight", None) is model.get_input_embeddings().weight else None
    reasons: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear:
            continue
        style = plan.get(_pattern(name))
        try:
            cut = cut_linear(
                *(style, (module.out_features, module.in_features), group.size, group.rank),
                head=_head_size(model, name),
                fully=shards.fully,
            )
            shards.cuts[name] = cut
        except ValueError as error:
            reasons.setdefault(_pattern(name), str(error))
    for name, module in list(model.named_modules()):
        if is_experts(module):
            try:
                shards.cuts.update(_cut_experts(name, module, plan, group, fully=shards.fully))
            except ValueError as error:
                reasons.setdefault(_pattern(name), str(error))
    sinks = _sinks(model, plan)
    for name, (style, heads) in sinks.items():
        if style != "colwise" or heads % group.size:
            reasons[_pattern(name)] = f"{heads} sinks of the style {style!r} cannot be dealt out"
    there = {_pattern(name) for name, _ in model.named_modules()}
    served = {*STYLES, "embedding_rowwise", EXPERTS_STYLE}
    odd = {name: style for name, style in plan.items() if name in there and style not in served}
    reasons |= {name: f"the style {style!r} is not served" for name, style in odd.items()}
    if reasons:
        raise _refusal(model, group, [f"{name}: {why}" for name, why in reasons.items()])
    for name, module in list(model.named_modules()):
        if is_experts(module):
            _narrow_experts(name, module, shards)
        elif name in shards.cuts:
            _narrow(module, name, shards.cuts[name], shards)
    for name, (_, heads) in sinks.items():
        _narrow_sinks(model, name, stripe(heads, group.size, group.rank), shards)
    _cut_embedding(model, tied, shards)
    return shards


def _refusal(model: PreTrainedModel, group: Group, reasons: list[str]) -> UnsupportedModel:
    return UnsupportedModel(
        f"{model.config.model_type} cannot be cut for {group.size} ranks: {'; '.join(reasons)}",
        field="tensor_parallel_size",
        remedy="--tensor-parallel-size 1, or a number that divides heads and layers evenly",
    )


def _pattern(name: str) -> str:
    """`model.layers.3.mlp` -> `model.layers.*.mlp`, as tp_plan has it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _head_size(model: PreTrainedModel, name: str) -> int:
    """Features of a head where `name` is a projection of an attention module, else 0."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if not hasattr(parent, "is_causal"):
        return 0
    size = getattr(parent, "head_dim", None)
    return size if isinstance(size, int) else 0


def _sinks(model: PreTrainedModel, plan: dict[str, str]) -> dict[str, tuple[str, int]]:
    """The style and the size of each parameter that an attention module itself has, one value a head,
    and that `plan` cuts with the heads."""
    own = [
        (f"{path}.{name}", parameter)
        for path, module in model.named_modules()
        if hasattr(module, "is_causal")
        for name, parameter in module.named_parameters(recurse=False)
    ]
    found = ((name, plan.get(_pattern(name)), parameter) for name, parameter in own)
    return {name: (style, len(p)) for name, style, p in found if style is not None and p.ndim == 1}


def _narrow_sinks(model: PreTrainedModel, name: str, part: Stripe, shards: Shards) -> None:
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    setattr(module, own, _empty((part.size,), getattr(module, own).dtype))
    shards.parts[name] = Part((part,))


def _narrow(linear: nn.Module, name: str, cut: Cut, shards: Shards) -> None:
    """Leave `linear` [out, in] the rows and columns of its cut."""
    assert isinstance(linear, nn.Linear)
    if cut.kind == "whole":
        return
    bias, dtype = linear.bias, linear.weight.dtype
    linear.out_features, linear.in_features = cut.output.size, cut.input.size
    linear.weight = _empty((cut.output.size, cut.input.size), dtype)
    shards.parts[f"{name}.weight"] = Part((cut.output, cut.input))
    if bias is None:
        return
    if cut.kind == "row" and shards.group.rank > 0:
        linear.bias = None  # type: ignore[assignment]  # of a sum over ranks it counts once
        return
    linear.bias = _empty((cut.output.size,), dtype)
    shards.parts[f"{name}.bias"] = Part((cut.output,))


def _cut_embedding(model: PreTrainedModel, tied: nn.Module | None, shards: Shards) -> None:
    """By vocabulary, unless it is one with a head that stays whole."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    if not isinstance(embedding, nn.Embedding) or (tied is not None and not _is_cut(model, shards)):
        return
    rows, width = embedding.weight.shape
    group = shards.group
    part = stripe(rows, group.size, group.rank)
    if tied is None:
        embedding.weight = _empty((part.size, width), embedding.weight.dtype)
    else:
        assert isinstance(tied.weight, nn.Parameter)
        embedding.weight = tied.weight
        head = next(name for name, module in model.named_modules() if module is tied)
        shards.parts.pop(f"{head}.weight", None)  # one parameter, and this is its first name
    embedding.num_embeddings = part.size
    model.set_input_embeddings(ShardedEmbedding(embedding, part, group))
    shards.parts[f"{name}{INNER}weight"] = Part((part, all_of(width)))


def _is_cut(model: PreTrainedModel, shards: Shards) -> bool:
    """Whether the output head holds a part of the vocabulary."""
    head = model.get_output_embeddings()
    return any(
        module is head and name in shards.cuts and shards.cuts[name].kind == "column"
        for name, module in model.named_modules()
    )


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


# --- experts ---------------------------------------------------------------------------------------


def is_experts(module: nn.Module) -> bool:
    """Whether it is a module of gated experts that goes through transformers' experts registry."""
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return (
        getattr(module, "has_gate", False) is True
        and hasattr(module, "is_transposed")
        and all(isinstance(weight, nn.Parameter) and weight.ndim == 3 for weight in weights)
    )


def _cut_experts(
    name: str, module: nn.Module, plan: Mapping[str, str], group: Group, *, fully: bool
) -> dict[str, Cut]:
    """Cuts of gate, up and down of every expert, all of them alike. Raises ValueError.

    What a plan leaves alone is cut as well: where the styles are missing, every rank would hold all."""
    pattern = _pattern(name)
    for part, style in EXPERT_STYLES.items():
        given = plan.get(f"{pattern}.{part}".rstrip("."))
        if given not in (None, style):
            raise ValueError(f"the style {given!r} of its experts is not served")
    if module.is_transposed or not module.is_concatenated or module.has_bias:
        raise ValueError(
            "experts with biases, or with transposed or alternating weights, are not cut"
        )
    weight: Any = module.down_proj
    hidden, inner = int(weight.shape[1]), int(weight.shape[2])
    up = cut_linear("colwise", (inner, hidden), group.size, group.rank, fully=fully)
    down = cut_linear("rowwise", (hidden, inner), group.size, group.rank, fully=fully)
    parts = {"gate_proj": up, "up_proj": up, "gate_up_proj": up, "down_proj": down}
    return {f"{name}.{part}": cut for part, cut in parts.items()}


def _narrow_experts(name: str, module: Any, shards: Shards) -> None:
    """Leave every expert the inner features of this rank."""
    up, down = shards.cuts[f"{name}.up_proj"], shards.cuts[f"{name}.down_proj"]
    count, hidden, inner = module.down_proj.shape
    dtype, experts, whole = module.down_proj.dtype, all_of(count), all_of(hidden)
    module.gate_up_proj = _empty((count, 2 * up.output.size, hidden), dtype)
    module.down_proj = _empty((count, hidden, down.input.size), dtype)
    first, second = up.output, Stripe(inner + up.output.start, inner + up.output.stop, 2 * inner)
    gate = Stripe(first.start, first.stop, 2 * inner)
    shards.parts[f"{name}.gate_up_proj"] = Part((experts, gate, whole), also=(1, second))
    shards.parts[f"{name}.down_proj"] = Part((experts, whole, down.input))
