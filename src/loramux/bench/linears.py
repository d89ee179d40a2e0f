"""The linears of a layer by a model's `config.json`: names, sizes, and how often each is there.

In a mixture of experts gate, up and down are there once for each expert, and a token goes through a
few of them. Which these are depends on weights that nobody has here, so what a step touches is an
expectation under uniform routing: each token takes any choice of experts with the same probability,
whatever the others take. A router that prefers some experts touches fewer.

Needs only the standard library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loramux.bench.case import LINEARS, attention_shapes, is_mixture, linear_shapes

MIXTURES = ("qwen3_moe",)  # model types whose experts are known here
OF_MLP = LINEARS[4:]


@dataclass(frozen=True, slots=True)
class Linear:
    """y [.., outputs] = x [.., inputs] @ W.T, once a layer, or once for each of `experts`."""

    path: str
    """Below the layer, with `{}` for the expert: `mlp.experts.{}.up_proj`."""

    inputs: int
    outputs: int
    experts: int = 0
    """0: it is an ordinary linear layer."""

    per_token: int = 1
    """How many of them a token goes through."""

    @property
    def weights(self) -> int:
        """Of one of them."""
        return self.inputs * self.outputs

    @property
    def count(self) -> int:
        return max(1, self.experts)

    def modules(self, layer: int) -> Iterator[str]:
        """`model.layers.0.mlp.experts.0.up_proj`, ...: the names that adapters have for them."""
        for expert in range(self.count):
            yield f"model.layers.{layer}.{self.path.format(expert)}"

    def touched(self, tokens: int) -> float:
        """How many of them `tokens` tokens are expected to go through; an ordinary one always."""
        if not self.experts:
            return 1
        return self.experts * (1 - (1 - self.per_token / self.experts) ** tokens)


def linears(config: dict[str, Any]) -> dict[str, Linear]:
    """`LINEARS` -> what stands behind the name in every layer.

    Raises:
        ValueError: a mixture of experts whose layers are not known here, with every reason.
    """
    if not is_mixture(config):
        return {
            name: Linear(f"{'mlp' if name in OF_MLP else 'self_attn'}.{name}", *shape)
            for name, shape in linear_shapes(config).items()
        }
    if reasons := _unknown(config):
        raise ValueError(
            f"the layers of this mixture of experts are not known to the benchmark: "
            f"{'; '.join(reasons)}; --geometry has one that is"
        )
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    experts, per_token = _num_experts(config), int(config["num_experts_per_tok"])
    found = {
        name: Linear(f"self_attn.{name}", *shape)
        for name, shape in attention_shapes(config).items()
    }
    for name in OF_MLP:
        shape = (inner, hidden) if name == "down_proj" else (hidden, inner)
        found[name] = Linear(f"mlp.experts.{{}}.{name}", *shape, experts, per_token)
    return found


def router_weights(config: dict[str, Any]) -> int:
    """Weights of a layer's router; 0 in a dense model."""
    return int(config["hidden_size"]) * _num_experts(config) if is_mixture(config) else 0


def _num_experts(config: dict[str, Any]) -> int:
    # Published files have the first name; transformers writes the second.
    return int(config.get("num_experts") or config["num_local_experts"])


def _unknown(config: dict[str, Any]) -> list[str]:
    """Why a mixture of experts is not like those of `MIXTURES`."""
    reasons = []
    if config.get("model_type") not in MIXTURES:
        reasons.append(f"model_type is {config.get('model_type')!r}, not {' or '.join(MIXTURES)}")
    if config.get("mlp_only_layers"):
        reasons.append(f"mlp_only_layers {config['mlp_only_layers']} have no experts")
    if config.get("decoder_sparse_step", 1) != 1:
        step = config["decoder_sparse_step"]
        reasons.append(f"decoder_sparse_step {step} leaves layers without experts")
    return reasons


def adapter_elements(config: dict[str, Any], r: int, targets: Sequence[str] = LINEARS) -> int:
    """Numbers in one adapter of rank `r` on `targets`, on all experts of a mixture."""
    found = linears(config)
    each = sum(
        (linear.inputs + linear.outputs) * linear.count
        for name, linear in found.items()
        if name in targets
    )
    return int(config["num_hidden_layers"]) * r * each
