"""Entering the mixture-of-experts layers of a transformers model through its experts registry.

Each module of experts gets an `Experts` that computes with its parameters; its router, whatever it is
called, gets a weight through which adapters are served. What was put together has to give what the
model's own experts give on random input, or the model is refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from loramux.config import LoRAConfig
from loramux.errors import UnsupportedModel
from loramux.kernels import Activation
from loramux.layers.batch import StepBatch
from loramux.layers.experts import NAME, Experts, ExpertWeights, experts_function
from loramux.layers.router import RouterLinear, RouterWeight
from loramux.models.names import has_a_matrix_an_expert
from loramux.models.shards import Shards, is_experts
from loramux.schema import ExpertsSpec, ModuleSpec

logger = logging.getLogger(__name__)

CHECKED_TOKENS = 9
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}
OWN = "grouped_mm"  # what transformers takes where nobody says otherwise
ACTIVATIONS: dict[str, Activation] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
}


@dataclass(slots=True)
class AttachedExperts:
    """The experts of one layer, by the name of their module."""

    name: str
    experts: Experts
    spec: ExpertsSpec


def attach_experts(
    model: PreTrainedModel, batch: StepBatch, lora: LoRAConfig | None, shards: Shards
) -> list[AttachedExperts]:
    """Give every module of experts in `model` its `Experts`, in place."""
    found = [(name, module) for name, module in model.named_modules() if is_experts(module)]
    permits = lora is not None and (
        lora.enable_mixed_moe_lora_format or lora.enable_moe_shared_loras
    )
    if not found:
        if permits:
            logger.info("%s has no experts: their LoRA formats mean nothing", type(model).__name__)
        return []
    ALL_EXPERTS_FUNCTIONS.register(NAME, _function)
    per_expert = has_a_matrix_an_expert(model)
    separate = per_expert or permits
    attached: list[AttachedExperts] = []
    expected: torch.Tensor | None = None
    for name, module in found:
        checked = not attached and module.gate_up_proj.device.type != "meta"
        if checked and shards.group.size == 1:
            expected = _try(module, module.num_experts)
        one = _attach(name, module, batch, shards, shares_a=not separate, per_expert=per_expert)
        module.config._experts_implementation = NAME
        if expected is not None and not attached:
            _compare(module, expected)
        attached.append(one)
    return attached


def _function(module: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    if hasattr(module, "loramux_experts"):
        return experts_function(module, *args, **kwargs)
    own: Callable[..., torch.Tensor] = ALL_EXPERTS_FUNCTIONS[OWN]
    return own(module, *args, **kwargs)


def _attach(
    name: str, module: Any, batch: StepBatch, shards: Shards, *, shares_a: bool, per_expert: bool
) -> AttachedExperts:
    interleaved = not module.is_concatenated
    gate: Callable[[torch.Tensor], torch.Tensor] = module._apply_gate
    if interleaved:
        _side_by_side(module)
        own = gate

        def gate(gate_up: torch.Tensor) -> torch.Tensor:
            halves = gate_up.unflatten(-1, (2, -1))  # [S, 2, I]
            return own(halves.transpose(-1, -2).flatten(-2))  # [S, I]

    plain = type(module)._apply_gate is _default_apply_gate
    activation = ACTIVATIONS.get(type(module.act_fn).__name__) if plain else None
    gate_up, down = module.gate_up_proj.data, module.down_proj.data
    if module.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)  # [E, 2 I, H], [E, H, I]
    up_bias, down_bias = (
        getattr(module, f"{part}_proj_bias", None) for part in ("gate_up", "down")
    )
    weights = ExpertWeights(gate_up, down, up_bias, down_bias, gate, activation)
    up_cut, down_cut = (shards.cuts.get(f"{name}.{part}_proj") for part in ("up", "down"))
    cuts = (up_cut, down_cut) if up_cut is not None and down_cut is not None else None
    experts = Experts(
        weights, batch, shares_a=shares_a, group=shards.group, cuts=cuts, fully=shards.fully
    )
    module.loramux_experts = experts
    spec = ExpertsSpec(
        name=name,
        num_experts=experts.num_experts,
        hidden=experts.hidden,
        inner=experts.inner if up_cut is None else up_cut.output.whole,
        shares_a=shares_a,
        interleaved=interleaved,
        per_expert=per_expert,
    )
    return AttachedExperts(name, experts, spec)


def _side_by_side(module: Any) -> None:
    """Turn gate and up, which alternate in the module's weights, into one after the other, in place."""
    weight, bias = module.gate_up_proj, getattr(module, "gate_up_proj_bias", None)
    for parameter, dim in ((weight, 2 if module.is_transposed else 1), (bias, 1)):
        if parameter is not None:
            halves = parameter.data.unflatten(dim, (-1, 2)).transpose(dim, dim + 1)
            parameter.data.copy_(halves.reshape(parameter.shape))


# --- what is compared ------------------------------------------------------------------------------


@torch.inference_mode()
def _try(module: Any, num_experts: int) -> torch.Tensor:
    """What a module gives for random tokens [T, H]; each goes to two experts."""
    weight = module.gate_up_proj
    hidden = weight.shape[1] if module.is_transposed else weight.shape[2]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(CHECKED_TOKENS, hidden, generator=generator).to(weight.device, weight.dtype)
    scores = torch.rand(CHECKED_TOKENS, num_experts, generator=generator).to(weight.device)
    shares, chosen = torch.topk(scores, min(2, num_experts), dim=-1)  # [T, K] each
    result: torch.Tensor = module(x, chosen, shares.to(weight.dtype))
    return result


def _compare(module: Any, expected: torch.Tensor) -> None:
    got = _try(module, module.num_experts)
    error = float((got - expected).float().norm() / expected.float().norm().clamp_min(1e-30))
    if not error <= TOLERANCE[got.dtype]:
        raise UnsupportedModel(
            f"{type(module).__name__} is not served: behind loramux's experts it differs from its own "
            f"forward by {error:.1e}",
            field="model",
        )


# --- what adapters bind to -------------------------------------------------------------------------


def module_specs(one: AttachedExperts, first_site: int) -> Iterator[ModuleSpec]:
    """What adapters may bind to: its gate and up are at `first_site`, its down at the next."""
    spec = one.spec
    *ups, down = spec.modules
    out = 2 * spec.inner if spec.shares_a else spec.inner
    for index, name in enumerate(ups):
        yield ModuleSpec(name, spec.hidden, out, first_site, index, spec.num_experts)
    yield ModuleSpec(down, spec.inner, spec.hidden, first_site + 1, 0, spec.num_experts)


# --- routers ---------------------------------------------------------------------------------------


def attach_routers(
    model: PreTrainedModel, batch: StepBatch, attached: list[AttachedExperts]
) -> dict[str, RouterLinear]:
    """Routers beside the experts, by name: those that multiply by a parameter of their own."""
    routers = {}
    for one in attached:
        path = one.name.rpartition(".")[0]
        for child, router in model.get_submodule(path).named_children():
            weight = router._parameters.get("weight")
            if type(router) is nn.Linear or weight is None:
                continue
            if tuple(weight.shape) != (one.spec.num_experts, one.spec.hidden):
                continue
            linear = RouterLinear(weight, router._parameters.get("bias"), batch)
            del router._parameters["weight"]
            router.weight = RouterWeight.of(weight, linear)
            routers[f"{path}.{child}"] = linear
    return routers


def detach_router(model: PreTrainedModel, name: str) -> None:
    """Give a router that does not multiply as we thought its parameter back."""
    router = model.get_submodule(name)
    weight = router.weight
    del router.weight
    router.weight = nn.Parameter(weight.as_subclass(torch.Tensor), requires_grad=False)
