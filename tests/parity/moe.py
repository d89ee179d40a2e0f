"""Tiny mixture-of-experts models, adapters for them in every layout, and what is right for both.

An adapter is made as plain differences to weights; its files are written from the same factors, in the
layout that is asked for. Right is transformers' own model with the differences added to its weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from parity.oracle import Composition
from tiny import COMMON, EOS, tokenizer

HEADS = {"num_key_value_heads": 2, "head_dim": 16}
DEEPSEEK = {
    **{"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4, "n_shared_experts": 1},
    **{"n_routed_experts": 8, "first_k_dense_replace": 1, "moe_intermediate_size": 24},
    **{"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    **{"num_experts_per_tok": 3, "routed_scaling_factor": 1.5},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, **HEADS},
    "qwen2_moe": {
        **{"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
        **{"shared_expert_intermediate_size": 40, **HEADS},
    },
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, **HEADS},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24, **HEADS},
    "deepseek_v2": DEEPSEEK,
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, **HEADS},
    "gpt_oss": {
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, **HEADS},
        "sliding_window": 16,
    },
}


def save_moe(folder: Path, family: str, seed: int = 0, **more: Any) -> Path:
    """A random fp32 checkpoint, whose tokens and whose choices of experts vary."""
    settings = {**COMMON, **FAMILIES[family], **more}
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.04 if "embed" in name or "lm_head" in name else 0.1)
            elif "bias" in name or "sinks" in name:
                parameter.normal_(0, 0.5)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@dataclass(slots=True)
class MadeAdapter:
    """An adapter's folder, and what it adds to each parameter of transformers' model."""

    path: Path
    deltas: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Layer:
    """The experts of one layer as transformers has them."""

    name: str
    num_experts: int
    hidden: int
    inner: int
    transposed: bool
    interleaved: bool


def layers_of(model: Any) -> list[Layer]:
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "is_transposed") and getattr(module, "has_gate", False):
            count, first, second = module.down_proj.shape
            inner, hidden = (first, second) if module.is_transposed else (second, first)
            found.append(
                Layer(name, count, hidden, inner, module.is_transposed, not module.is_concatenated)
            )
    return found


class Factors:
    """Random A [E, r, in] and B [E, out, r] of each projection of one layer."""

    def __init__(self, layer: Layer, layout: str, ranks: dict[str, int], skipped: Sequence[int]):
        count = layer.num_experts
        sizes = {"gate": (layer.hidden, layer.inner), "up": (layer.hidden, layer.inner)}
        sizes["down"] = (layer.inner, layer.hidden)
        self.a: dict[str, torch.Tensor] = {}
        self.b: dict[str, torch.Tensor] = {}
        for part, (features, out) in sizes.items():
            if part not in ranks:
                continue
            self.a[part] = 0.15 * torch.randn(count, ranks[part], features)
            self.b[part] = 0.15 * torch.randn(count, out, ranks[part])
            self.b[part][list(skipped)] = 0
        if layout == "fused" and "gate" in ranks:
            self.a["up"] = self.a["gate"]
        if layout == "outer":
            for part in ("gate", "up"):
                self.a[part] = self.a[part][:1].expand_as(self.a[part])
            self.b["down"] = self.b["down"][:1].expand_as(self.b["down"])


def make_adapter(
    model_folder: Path,
    folder: Path,
    layout: str,
    *,
    seed: int,
    r: int = 4,
    rank_pattern: dict[str, int] | None = None,
    parts: Sequence[str] = ("gate", "up", "down"),
    linears: Sequence[str] = ("q_proj", "o_proj"),
    router: str | None = None,
    skipped: Sequence[int] = (),
    names: Callable[[str], str] = lambda name: name,
    projections: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
) -> MadeAdapter:
    """An adapter on experts in `layout` ("per_expert", "fused" or "outer"), on `linears` beside them,
    and on the `router` of each layer; alpha is 2 r. `names` gives a module another name in the files."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    pattern, tensors = rank_pattern or {}, {}
    made = MadeAdapter(folder)
    scale = 2.0
    ranks = {part: pattern.get(part, r) for part in parts}
    if layout != "fused":  # what the configuration names stands in other layers as well
        linears = (*linears, *(projections[i] for i, p in enumerate(PARTS) if p in parts))
    for layer in layers_of(model):
        factors = Factors(layer, layout, ranks, skipped)
        tensors |= _files(layer, layout, factors, parts, skipped, names, projections)
        _add_deltas(made.deltas, layer, factors, parts, scale)
    for name, module in model.named_modules():
        is_router = router is not None and name.endswith(router)
        if name.endswith(tuple(linears)) or is_router:
            out, features = module.weight.shape
            named = dict(zip(projections, PARTS, strict=True))
            rows = pattern.get(named.get(name.rpartition(".")[2], ""), r)
            a, b = 0.15 * torch.randn(rows, features), 0.15 * torch.randn(out, rows)
            key = f"base_model.model.{names(name)}"
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            made.deltas[f"{name}.weight"] = scale * b @ a
    folder.mkdir(parents=True)
    save_file(
        {key: t.contiguous() for key, t in tensors.items()}, folder / "adapter_model.safetensors"
    )
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r}
    config |= {"lora_alpha": 2 * r, "bias": "none", "target_modules": list(linears)}
    if layout == "fused":
        config["target_parameters"] = _parameters(parts)
        if router is not None:
            config["target_parameters"].append(f"{router}.weight")
        config["rank_pattern"] = {}
    else:
        config["target_modules"] += [router.rpartition(".")[2]] if router else []
        places = {p: projections[i] for i, p in enumerate(PARTS)}
        config["rank_pattern"] = {places[part]: size for part, size in pattern.items()}
        config["alpha_pattern"] = {places[part]: 2 * size for part, size in pattern.items()}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return made


PARTS = ("gate", "up", "down")


def _parameters(parts: Sequence[str]) -> list[str]:
    named = ["experts.gate_up_proj"] if "gate" in parts else []
    return named + (["experts.down_proj"] if "down" in parts else [])


def _files(
    layer: Layer,
    layout: str,
    factors: Factors,
    parts: Sequence[str],
    skipped: Sequence[int],
    names: Callable[[str], str],
    projections: Sequence[str],
) -> dict[str, torch.Tensor]:
    key = f"base_model.model.{names(layer.name)}"
    if layout == "fused":
        return _fused_files(layer, factors, parts, key)
    tensors = {}
    for part in parts:
        projection = projections[PARTS.index(part)]
        a, b = factors.a[part], factors.b[part]
        if layout == "outer":
            shared = (a[:1], b) if part != "down" else (a, b[:1])
            for half, tensor in zip("AB", shared, strict=True):
                tensors[f"{key}.{projection}.lora_{half}.weight"] = tensor
            continue
        for expert in range(layer.num_experts):
            if expert not in skipped:
                name = f"{key}.{expert}.{projection}"
                tensors |= {f"{name}.lora_A.weight": a[expert], f"{name}.lora_B.weight": b[expert]}
    return tensors


def _fused_files(
    layer: Layer, factors: Factors, parts: Sequence[str], key: str
) -> dict[str, torch.Tensor]:
    """As PEFT's parameter wrappers save: A expert by expert, B with the experts innermost."""
    tensors = {}
    if "gate" in parts:
        halves = (factors.b["gate"], factors.b["up"])
        b = torch.stack(halves, 2).flatten(1, 2) if layer.interleaved else torch.cat(halves, 1)
        inner = f"{key}.base_layer" if "down" in parts else key
        tensors |= _wrapped(inner, factors.a["gate"], b)
    if "down" in parts:
        tensors |= _wrapped(key, factors.a["down"], factors.b["down"])
    return tensors


def _wrapped(key: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    """a [E, r, in], b [E, out, r]."""
    return {
        f"{key}.lora_A.weight": a.flatten(0, 1),
        f"{key}.lora_B.weight": b.permute(1, 2, 0).flatten(1, 2),
    }


def _add_deltas(
    deltas: dict[str, torch.Tensor],
    layer: Layer,
    factors: Factors,
    parts: Sequence[str],
    scale: float,
) -> None:
    grown = {part: scale * factors.b[part] @ factors.a[part] for part in parts}  # [E, out, in] each
    if "gate" in parts or "up" in parts:
        nothing = torch.zeros(layer.num_experts, layer.inner, layer.hidden)
        halves = [grown.get("gate", nothing), grown.get("up", nothing)]
        whole = torch.stack(halves, 2).flatten(1, 2) if layer.interleaved else torch.cat(halves, 1)
        deltas[f"{layer.name}.gate_up_proj"] = whole.transpose(1, 2) if layer.transposed else whole
    if "down" in parts:
        down = grown["down"]
        deltas[f"{layer.name}.down_proj"] = down.transpose(1, 2) if layer.transposed else down


class MergedOracle:
    """Transformers' own model, with the differences of a composition in its weights."""

    def __init__(self, model_folder: Path, adapters: dict[str, MadeAdapter]):
        self.model = AutoModelForCausalLM.from_pretrained(
            *(model_folder,), dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.model.set_experts_implementation("eager")
        self._adapters = adapters
        self._base = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int], composition: Composition) -> torch.Tensor:
        """[T, V] for one sequence under a sum of scaled adapters; {} is the base."""
        parameters = dict(self.model.named_parameters())
        for name, value in self._base.items():
            parameters[name].copy_(value)
        for name, scale in composition.items():
            for parameter, delta in self._adapters[name].deltas.items():
                parameters[parameter].add_(delta, alpha=scale)
        ids = torch.tensor([list(token_ids)])  # [1, T]
        return self.model(input_ids=ids, use_cache=False).logits[0]

    def greedy(self, prompt: Sequence[int], composition: Composition, count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens, composition)[-1].argmax()))
        return tokens[len(prompt) :]
