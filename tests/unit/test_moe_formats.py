"""LoRA on experts in every layout that there is: read into one form, or refused with every reason."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from loramux.adapters.peft import read_adapter
from loramux.adapters.weights import AdapterWeights
from loramux.config import LoRAConfig
from loramux.errors import AdapterRejected
from loramux.schema import ExpertsSpec, ModelSchema, ModuleSpec

EXPERTS, HIDDEN, INNER, LAYERS = 4, 16, 12, 2
NATURAL = LoRAConfig(max_lora_rank=16)
SHARED = LoRAConfig(max_lora_rank=16, enable_moe_shared_loras=True)
MIXED = LoRAConfig(max_lora_rank=16, enable_mixed_moe_lora_format=True)
PREFIX = "base_model.model."

Deltas = dict[tuple[str, int], torch.Tensor]
"""(module, expert) -> what is added to its weight, [out, in]."""


def make_schema(
    *,
    inner: int = INNER,
    hidden: int = HIDDEN,
    shares_a: bool = False,
    interleaved: bool = False,
    per_expert: bool = True,
    parent: str = "mlp",
    router: str = "gate",
) -> ModelSchema:
    modules: dict[str, ModuleSpec] = {}
    experts: dict[str, ExpertsSpec] = {}
    aliases: dict[str, str] = {}
    for layer in range(LAYERS):
        root = f"model.layers.{layer}"
        q, gate = f"{root}.self_attn.q_proj", f"{root}.{parent}.{router}"
        modules[q] = ModuleSpec(q, hidden, 16, 10 * layer, 0)
        modules[gate] = ModuleSpec(gate, hidden, EXPERTS, 10 * layer + 1, 0)
        name = f"{root}.{parent}.experts"
        old = f"{root}.block_sparse_moe"
        aliases[f"{old}.gate"] = gate
        spec = ExpertsSpec(
            name, EXPERTS, hidden, inner, shares_a, interleaved, per_expert, (f"{old}.experts",)
        )
        experts[name] = spec
        sizes = {
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "gate_up_proj": (hidden, 2 * inner),
            "down_proj": (inner, hidden),
        }
        for index, module in enumerate(spec.modules):
            size = sizes[module.rpartition(".")[2]]
            modules[module] = ModuleSpec(module, *size, 10 * layer + 2 + index, 0, EXPERTS)
    return ModelSchema(modules, {"lm_head": "the output head is not served"}, experts, aliases)


def read(
    folder: Path, schema: ModelSchema, config: LoRAConfig, dtype: torch.dtype = torch.float32
) -> AdapterWeights:
    return read_adapter("a", folder, schema, config, dtype)[0]


def refusal(folder: Path, schema: ModelSchema, config: LoRAConfig = NATURAL) -> list[str]:
    with pytest.raises(AdapterRejected) as caught:
        read(folder, schema, config)
    assert caught.value.reasons and len(caught.value.reasons) <= 60
    return caught.value.reasons


def deltas(weights: AdapterWeights) -> Deltas:
    """scale * b @ a of every expert that has LoRA, as the canonical form has them."""
    return {
        (module, expert): scale * b.float() @ a.float()  # [out, in]
        for module, experts in weights.layout.experts.items()
        for expert, a, b, scale in experts.views(weights.buffer)
    }


def assert_same(ours: Deltas, theirs: Deltas) -> None:
    assert ours.keys() == theirs.keys()
    for key, delta in theirs.items():
        torch.testing.assert_close(ours[key], delta, rtol=1e-5, atol=1e-6, msg=f"{key} is another")


# Adapters that PEFT makes of the experts' parameters


COMMON: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
}


def make_model(family: str, inner: int = INNER) -> PreTrainedModel:
    if family == "qwen3":
        sizes = {"num_experts": EXPERTS, "moe_intermediate_size": inner, "intermediate_size": 20}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **sizes))
    sizes = {"num_local_experts": EXPERTS, "intermediate_size": inner}
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**COMMON, **sizes))
    kinds = ["full_attention"] * LAYERS
    return GptOssForCausalLM(GptOssConfig(**COMMON, **sizes, layer_types=kinds))


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"per_expert": True},
    "mixtral": {"per_expert": True},
    "gpt-oss": {"per_expert": False, "interleaved": True, "router": "router"},
}


def randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)


def save(folder: Path, family: str, inner: int = INNER, **peft: Any) -> PeftModel:
    """An adapter as PEFT trains and saves it, and a model that PEFT has loaded it into."""
    model = get_peft_model(make_model(family, inner), LoraConfig(task_type="CAUSAL_LM", **peft))
    randomise(model)
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(make_model(family, inner), folder)


def of_peft(model: PeftModel, spec: ExpertsSpec) -> Deltas:
    """What PEFT adds to each expert of the layer, cut as the modules of `spec` are."""
    found: Deltas = {}
    module = model.base_model.model.get_submodule(spec.name)
    while isinstance(module, ParamWrapper):
        delta = module.get_delta_weight("default").detach()  # [E, out, in] or [E, in, out]
        if module.get_base_layer().__class__.__name__ == "GptOssExperts":
            delta = delta.transpose(1, 2)  # [E, out, in]
        if module.parameter_name == "down_proj":
            parts = {"down_proj": delta}
        else:
            pairs = (delta[:, ::2], delta[:, 1::2]) if spec.interleaved else delta.chunk(2, 1)
            parts = dict(zip(("gate_proj", "up_proj"), pairs, strict=True))
            if spec.shares_a:
                parts = {"gate_up_proj": torch.cat(pairs, 1)}  # [E, 2 * inner, in]
        for name, part in parts.items():
            found |= {(f"{spec.name}.{name}", expert): part[expert] for expert in range(EXPERTS)}
        module = module.base_layer
    return found


TARGETS: list[list[str]] = [
    ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    ["experts.gate_up_proj"],
    ["down_proj"],
    ["model.layers.1.mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
]
PATTERNS: list[dict[str, Any]] = [
    {"r": 3, "lora_alpha": 5},
    {
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": {"experts.gate_up_proj": 5, "0.mlp.experts.down_proj": 1},
        "alpha_pattern": {r"1\.mlp\.experts\.\w+": 7, "down_proj": 2},
        "use_rslora": True,
    },
]


@pytest.mark.parametrize("shares_a", [False, True], ids=["cut", "whole"])
@pytest.mark.parametrize("patterns", PATTERNS, ids=["plain", "patterns"])
@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_parameters_as_peft_saves_them(
    tmp_path: Path, family: str, targets: list[str], patterns: dict[str, Any], shares_a: bool
) -> None:
    model = save(tmp_path, family, target_modules=[], target_parameters=targets, **patterns)
    schema = make_schema(**FAMILIES[family] | {"per_expert": False}, shares_a=shares_a)
    weights = read(tmp_path, schema, NATURAL)
    for spec in schema.experts.values():
        ours = {key: delta for key, delta in deltas(weights).items() if key[0] in spec.modules}
        assert_same(ours, of_peft(model, spec))
    ranks = {int(experts.r.max()) for experts in weights.layout.experts.values()}
    assert weights.ref.max_r == max(ranks) and not weights.layout.pairs


@pytest.mark.parametrize("inner", [HIDDEN, HIDDEN // 2], ids=["inner=hidden", "2*inner=hidden"])
@pytest.mark.parametrize("targets", TARGETS[:4], ids=" ".join)
def test_fused_parameters_whose_sizes_look_alike(
    tmp_path: Path, targets: list[str], inner: int
) -> None:
    peft = {"target_modules": [], "target_parameters": targets, "r": 3, "lora_alpha": 5}
    model = save(tmp_path, "qwen3", inner, **peft)
    schema = make_schema(inner=inner)
    ours = deltas(read(tmp_path, schema, MIXED))
    theirs = [of_peft(model, spec) for spec in schema.experts.values()]
    assert_same(ours, theirs[0] | theirs[1])


def test_the_shape_decides_where_the_parameters_are_wrapped_the_other_way(tmp_path: Path) -> None:
    peft = {"target_modules": [], "target_parameters": TARGETS[0], "r": 3, "lora_alpha": 5}
    model = save(tmp_path, "qwen3", **peft)
    swapped = {
        (
            key.replace(".base_layer", "")
            if "base_layer" in key
            else key.replace("experts.", "experts.base_layer.")
        ): tensor
        for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    save_file(swapped, tmp_path / "adapter_model.safetensors")
    schema = make_schema()
    theirs = [of_peft(model, spec) for spec in schema.experts.values()]
    assert_same(deltas(read(tmp_path, schema, MIXED)), theirs[0] | theirs[1])


def test_a_fused_gate_up_shares_the_bytes_of_a(tmp_path: Path) -> None:
    peft = {"target_modules": [], "target_parameters": TARGETS[0], "r": 3, "lora_alpha": 5}
    save(tmp_path, "gpt-oss", **peft)
    schema = make_schema(**FAMILIES["gpt-oss"])
    weights, report = read_adapter("a", tmp_path, schema, MIXED, torch.float16)
    experts = weights.layout.experts
    gate, up = (experts[f"model.layers.0.mlp.experts.{part}"] for part in ("gate_proj", "up_proj"))
    assert (gate.a.offsets == up.a.offsets).all() and (gate.b.offsets != up.b.offsets).all()
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert weights.buffer.numel() == sum(t.numel() for t in file.values()) * 4, "nothing is copied"
    rows = LAYERS * EXPERTS * 3
    assert weights.ref.num_bytes == rows * (2 * (HIDDEN + INNER) + (INNER + HIDDEN)) * 2, (
        "gate, up and down in fp16"
    )
    assert {row.tensor for row in report.rows} == set(file)
    assert report.num_modules == LAYERS * 3 and "8 tensors bind to 6 modules" in report.format()
    whole = read(
        tmp_path, make_schema(**FAMILIES["gpt-oss"], shares_a=True), NATURAL, torch.float16
    )
    assert whole.ref.num_bytes == rows * ((HIDDEN + 2 * INNER) + (INNER + HIDDEN)) * 2
    assert whole.ref.digest == weights.ref.digest


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_old_targets_that_peft_trains_as_parameters(tmp_path: Path, family: str) -> None:
    """PEFT turns the targets of older models into parameters, with twice the rank for gate_up."""
    old = ["w1", "w2", "w3"] if family == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    model = save(tmp_path, family, target_modules=[*old, "gate", "q_proj"], r=3, lora_alpha=5)
    schema = make_schema()
    weights = read(tmp_path, schema, MIXED)
    theirs = [of_peft(model, spec) for spec in schema.experts.values()]
    assert_same(deltas(weights), theirs[0] | theirs[1])
    assert weights.ref.max_r == 6
    router = "model.layers.1.mlp.gate"
    assert weights.layout.pairs.keys() == {
        f"model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("mlp.gate", "self_attn.q_proj")
    }
    pair = weights.pairs[router]
    theirs_router = model.base_model.model.get_submodule(router).get_delta_weight("default")
    torch.testing.assert_close(pair.scale * (pair.b.t() @ pair.a), theirs_router)


def test_lora_on_a_router_takes_its_rank_from_the_parameter(tmp_path: Path) -> None:
    save(
        tmp_path,
        "gpt-oss",
        target_modules=["q_proj"],
        target_parameters=["mlp.router.weight"],
        r=3,
        lora_alpha=6,
        rank_pattern={"router": 5, "router.weight": 2},
    )
    weights = read(tmp_path, make_schema(**FAMILIES["gpt-oss"]), NATURAL)
    pair = weights.pairs["model.layers.0.mlp.router"]
    assert (pair.r, pair.scale) == (2, 3.0) and not weights.layout.experts


def test_all_linear_needs_no_experts(tmp_path: Path) -> None:
    save(tmp_path, "gpt-oss", target_modules=["q_proj"], r=3, lora_alpha=6)
    schema = make_schema(**FAMILIES["gpt-oss"])
    for targets in ("all-linear", ["q_proj", "gate_proj", "up_proj", "down_proj", "router"]):
        edit_config(tmp_path, target_modules=targets)
        assert len(read(tmp_path, schema, NATURAL).pairs) == LAYERS


# Adapters with a matrix an expert, as older transformers had them


STYLES = {
    "qwen3": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
}
CANONICAL = ("gate_proj", "up_proj", "down_proj")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def per_expert(
    folder: Path,
    style: str = "qwen3",
    r_of: Callable[[str], int] = lambda name: 3,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> tuple[Path, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """A file with a matrix an expert, in a random order, and its factors by name; rank 0: left out."""
    stem, *leaves = STYLES[style]
    tensors: dict[str, torch.Tensor] = {}
    factors = {}
    names = [
        (f"model.layers.{layer}.{stem}.{expert}.{leaf}", CANONICAL[index])
        for layer in range(LAYERS)
        for index, leaf in enumerate(leaves)
        for expert in range(EXPERTS)
    ]
    for at in torch.randperm(len(names)).tolist():
        name, projection = names[at]
        inputs, outputs = (INNER, HIDDEN) if projection == "down_proj" else (HIDDEN, INNER)
        if r := r_of(name):
            a, b = torch.randn(r, inputs).to(dtype), torch.randn(outputs, r).to(dtype)
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a  # [r, in]
            tensors[f"{PREFIX}{name}.lora_B.weight"] = b  # [out, r]
            factors[name] = (a, b)
    config.setdefault("target_modules", leaves)
    return write(folder, tensors, **config), factors


def reference(factors: dict[str, tuple[torch.Tensor, torch.Tensor]], scale: Any) -> Deltas:
    found = {}
    for name, (a, b) in factors.items():
        layer, expert, leaf = re.findall(r"layers\.(\d)\.[\w.]+\.(\d)\.(\w+)$", name)[0]
        projection = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(leaf, leaf)
        module = f"model.layers.{layer}.mlp.experts.{projection}"
        value = scale(name, a.shape[0]) if callable(scale) else scale
        found[module, int(expert)] = value * b.float() @ a.float()  # [out, in]
    return found


@pytest.mark.parametrize("style", STYLES)
def test_a_matrix_an_expert_as_peft_loads_it(tmp_path: Path, style: str) -> None:
    folder, factors = per_expert(tmp_path / "a", style)
    schema = make_schema()
    ours = deltas(read(folder, schema, NATURAL))
    assert_same(ours, reference(factors, 5 / 3))
    theirs = PeftModel.from_pretrained(make_model(style), folder)
    peft = [of_peft(theirs, spec) for spec in schema.experts.values()]
    assert_same(ours, peft[0] | peft[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_old_file_with_routers_and_attention(tmp_path: Path, dtype: torch.dtype) -> None:
    folder, factors = per_expert(
        tmp_path / "a", "mixtral", dtype=dtype, target_modules=["w1", "w2", "w3", "gate", "q_proj"]
    )

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(LAYERS):
            for name, out in (("block_sparse_moe.gate", EXPERTS), ("self_attn.q_proj", 16)):
                stem = f"{PREFIX}model.layers.{layer}.{name}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(3, HIDDEN)  # [r, in], float32
                tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 3)  # [out, r], float32

    edit_weights(folder, add)
    weights = read(folder, make_schema(), NATURAL)
    assert_same(deltas(weights), reference(factors, 5 / 3))
    assert "model.layers.0.mlp.gate" in weights.pairs and len(weights.pairs) == 2 * LAYERS
    edit_weights(
        folder, lambda t: [t.pop(k) for k in list(t) if "layers.1.block_sparse_moe.gate" in k]
    )
    assert any(
        "mlp.gate, but the file has no" in reason for reason in refusal(folder, make_schema())
    )


def test_ranks_of_their_own_and_experts_without_lora(tmp_path: Path) -> None:
    ranks = {"gate_proj": 2, "up_proj": 5, "down_proj": 1}

    def r_of(name: str) -> int:
        if name.endswith("layers.1.mlp.experts.3.up_proj"):
            return 7
        return 0 if ".experts.2." in name else ranks[name.rpartition(".")[2]]

    patterns = {"model.layers.1.mlp.experts.3.up_proj": 7, r"\d\.gate_proj": 2, "down_proj": 1}
    folder, factors = per_expert(
        tmp_path / "a",
        r_of=r_of,
        r=5,
        target_modules=r".*\.experts\.[^2]\.\w+_proj",
        rank_pattern=patterns,
        alpha_pattern={"mlp.experts.0.up_proj": 11, r".*layers\.1\.mlp\.experts\.\d\.up_proj": 3},
    )

    def scale(name: str, r: int) -> float:
        if name.endswith("0.up_proj"):
            return 11 / r
        return (3 if "layers.1" in name and name.endswith("up_proj") else 5) / r

    weights = read(folder, make_schema(), NATURAL)
    assert_same(deltas(weights), reference(factors, scale))
    up = weights.layout.experts["model.layers.1.mlp.experts.up_proj"]
    assert up.r.tolist() == [5, 5, 0, 7] and weights.ref.max_r == 7
    floats = sum(a.numel() + b.numel() for a, b in factors.values())
    assert weights.ref.num_bytes == floats * 4


def test_gate_alone_is_an_adapter(tmp_path: Path) -> None:
    folder, factors = per_expert(
        tmp_path / "a",
        r_of=lambda name: 3 * name.endswith("gate_proj"),
        target_modules=["gate_proj"],
    )
    assert_same(deltas(read(folder, make_schema(), NATURAL)), reference(factors, 5 / 3))


def test_activated_lora_is_not_served_on_experts(tmp_path: Path) -> None:
    folder, _ = per_expert(tmp_path / "a", alora_invocation_tokens=[5])
    word = "alora_invocation_tokens with LoRA on experts"
    assert any(word in reason for reason in refusal(folder, make_schema()))


# Factors that experts share


def shared_outer(folder: Path, leaves: tuple[str, ...] = ("w1", "w3", "w2"), **config: Any) -> Path:
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        for index, leaf in enumerate(leaves):
            name = f"{PREFIX}model.layers.{layer}.mlp.experts.{leaf}"
            is_down = index == 2
            inputs, outputs = (INNER, HIDDEN) if is_down else (HIDDEN, INNER)
            tensors[f"{name}.lora_A.weight"] = torch.randn(EXPERTS if is_down else 1, 3, inputs)
            tensors[f"{name}.lora_B.weight"] = torch.randn(1 if is_down else EXPERTS, outputs, 3)
    config.setdefault("target_modules", list(leaves))
    return write(folder, tensors, **config)


@pytest.mark.parametrize("config", [SHARED, MIXED], ids=["shared", "mixed"])
@pytest.mark.parametrize("leaves", [("w1", "w3", "w2"), CANONICAL], ids=" ".join)
def test_factors_of_all_experts(
    tmp_path: Path, leaves: tuple[str, ...], config: LoRAConfig
) -> None:
    folder = shared_outer(tmp_path / "a", leaves)
    edit_weights(  # one whose experts share nothing
        folder,
        lambda t: t.update(
            {
                f"{PREFIX}model.layers.1.mlp.experts.{leaves[0]}.lora_A.weight": torch.randn(
                    EXPERTS, 3, HIDDEN
                )
            }
        ),
    )
    file = load_file(folder / "adapter_model.safetensors")
    expected: Deltas = {}
    for layer in range(LAYERS):
        for leaf, projection in zip(leaves, CANONICAL, strict=True):
            stem = f"model.layers.{layer}.mlp.experts"
            a, b = (file[f"{PREFIX}{stem}.{leaf}.lora_{half}.weight"] for half in "AB")
            delta = 5 / 3 * (b @ a).expand(EXPERTS, -1, -1)  # [E, out, in]
            expected |= {(f"{stem}.{projection}", e): delta[e] for e in range(EXPERTS)}
    weights = read(folder, make_schema(), config)
    assert_same(deltas(weights), expected)
    assert weights.buffer.numel() == sum(t.numel() for t in file.values()) * 4, "nothing is copied"
    assert weights.ref.num_bytes == LAYERS * 3 * EXPERTS * 3 * (HIDDEN + INNER) * 4, (
        "each expert has its own there"
    )


# The settings


def layouts(root: Path) -> dict[str, Path]:
    folders = {
        "per expert": per_expert(root / "each")[0],
        "shared outer": shared_outer(root / "shared"),
    }
    save(
        root / "fused",
        "qwen3",
        target_modules=[],
        target_parameters=["down_proj"],
        r=3,
        lora_alpha=5,
    )
    return folders | {"fused": root / "fused"}


@pytest.mark.parametrize("per_expert", [True, False])
def test_what_each_setting_serves(tmp_path: Path, per_expert: bool) -> None:
    natural = "per expert" if per_expert else "fused"
    served = {
        "natural": {natural},
        "shared": {natural, "shared outer"},
        "mixed": {"per expert", "fused", "shared outer"},
    }
    configs = {"natural": NATURAL, "shared": SHARED, "mixed": MIXED}
    for setting, config in configs.items():
        for layout, folder in layouts(tmp_path / setting).items():
            schema = make_schema(per_expert=per_expert)
            if layout in served[setting]:
                assert read(folder, schema, config).layout.experts
                continue
            reasons = refusal(folder, schema, config)
            assert len(reasons) == 1 and "--enable-mixed-moe-lora-format" in reasons[0]
            assert f"comes {layout}" in reasons[0] and f"served {natural}" in reasons[0]
            assert ("--enable-moe-shared-loras" in reasons[0]) == (layout == "shared outer")


def test_a_shared_a_has_no_place_for_separate_ones(tmp_path: Path) -> None:
    schema = make_schema(shares_a=True, per_expert=False)
    for layout, folder in layouts(tmp_path).items():
        if layout == "fused":
            assert read(folder, schema, NATURAL).layout.experts
        else:
            assert [f"comes {layout}" in reason for reason in refusal(folder, schema)] == [True]


def test_all_layouts_in_one_adapter(tmp_path: Path) -> None:
    """Gate and up fused; down per expert in one layer and shared in the other; attention beside them."""
    peft = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"], "r": 3}
    model = save(tmp_path / "a", "qwen3", **peft, lora_alpha=5)
    each, factors = per_expert(tmp_path / "each")
    more = load_file(each / "adapter_model.safetensors")
    more |= load_file(shared_outer(tmp_path / "shared") / "adapter_model.safetensors")
    parts = ("0.mlp.experts.", "1.mlp.experts.w2")
    down = {
        key: t for key, t in more.items() if parts[1] in key or (parts[0] in key and "down" in key)
    }
    edit_config(tmp_path / "a", target_modules=["q_proj", "down_proj", "w2"])
    edit_weights(tmp_path / "a", lambda tensors: tensors.update(down))
    schema = make_schema()
    weights = read(tmp_path / "a", schema, MIXED)
    theirs = [of_peft(model, spec) for spec in schema.experts.values()]
    expected = theirs[0] | theirs[1]
    own = {name: pair for name, pair in factors.items() if "layers.0" in name and "down" in name}
    expected |= reference(own, 5 / 3)
    name = "model.layers.1.mlp.experts"
    a, b = (more[f"{PREFIX}{name}.w2.lora_{half}.weight"] for half in "AB")
    expected |= {(f"{name}.down_proj", e): 5 / 3 * b[0] @ a[e] for e in range(EXPERTS)}
    assert_same(deltas(weights), expected)
    assert len(weights.pairs) == LAYERS
    edit_config(tmp_path / "a", rank_pattern={"0.mlp.experts.2.down_proj": 2})
    reasons = refusal(tmp_path / "a", schema)
    assert sum("--enable-mixed-moe-lora-format" in reason for reason in reasons) == 2, reasons
    assert sum("expected [2, 12]" in reason for reason in reasons) == 1, reasons


# What is refused


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return edit


def drop(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if part in key]:
            del tensors[key]

    return edit


def put(key: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(
        f"{PREFIX}model.layers.0.mlp.experts.{key}.weight", tensor
    )


GATE = "1.gate_proj.lora_A"
PER_EXPERT_REFUSALS: list[
    tuple[Callable[[dict[str, torch.Tensor]], Any], dict[str, Any], list[str]]
] = [
    (rename("0.mlp.experts.3.", "0.mlp.experts.4."), {}, ["has 4 experts, 0 to 3, and no '4'"]),
    (rename("experts.3.", "experts.03."), {}, ["no '03'"]),
    (rename("experts.3.", f"experts.{'9' * 5000}."), {}, ["has 4 experts"]),
    (rename("experts.3.", "experts.\u0663."), {}, ["has 4 experts"]),
    (rename("experts.3.gate_proj", "experts.3.gate_up_proj"), {}, ["has no 'gate_up_proj'"]),
    (
        rename("mlp.experts", "feed_forward.experts"),
        {},
        ["feed_forward.experts.0", "this model has model.layers.0.mlp.experts and 1 more layers"],
    ),
    (drop(GATE), {}, ["layers.0.mlp.experts.1.gate_proj has lora_B but not its other half"]),
    (
        drop("0.mlp.experts.1.up_proj"),
        {},
        ["targets model.layers.0.mlp.experts.1.up_proj, but the file"],
    ),
    (
        drop("layers.1."),
        {},
        ["layers.1.mlp.experts.0.gate_proj, but the file", "and 4 more of the same"],
    ),
    (put(GATE, torch.zeros(2, HIDDEN)), {}, ["has shape [2, 16], expected [3, 16]"]),
    (put(GATE, torch.zeros(3, 1, HIDDEN)), {}, ["has shape [3, 1, 16]"]),
    (put(GATE, torch.zeros(3, HIDDEN, dtype=torch.float16)), {}, ["gate_proj mixes F16 and F32"]),
    (put(GATE, torch.zeros(3, HIDDEN, dtype=torch.int32)), {}, ["has dtype I32"]),
    (put(GATE, torch.full((3, HIDDEN), math.nan)), {}, [f"{GATE}.weight holds NaN"]),
    (put(GATE, torch.full((3, HIDDEN), -math.inf)), {}, [f"{GATE}.weight holds NaN or infinity"]),
    (
        put("1.w1.lora_A", torch.zeros(3, HIDDEN)),
        {},
        ["1.w1 has lora_A", "expert 1 comes under two names"],
    ),
    (
        put("gate_proj.lora_A", torch.zeros(1, 3, HIDDEN)),
        {},
        ["gate_proj comes in two layouts: per expert"],
    ),
    (
        put("1.gate_proj.lora_C", torch.zeros(3, HIDDEN)),
        {},
        ["is no lora_A.weight or lora_B.weight"],
    ),
    (lambda t: None, {"r": 4}, ["expected [4, 16]", "and 40 more of the same kind"]),
    (lambda t: None, {"rank_pattern": {"experts.1.gate_proj": 2}}, ["expected [2, 16]"]),
    (
        lambda t: None,
        {"r": 17},
        ["rank 17, larger than max_lora_rank 16; start with --max-lora-rank 17"],
    ),
    (
        lambda t: None,
        {"target_modules": ["gate_proj", "up_proj"]},
        ["does not target", "down_proj"],
    ),
    (lambda t: None, {"use_dora": True}, ["use_dora"]),
]


@pytest.mark.parametrize("case", range(len(PER_EXPERT_REFUSALS)))
def test_refusals_of_a_matrix_an_expert(tmp_path: Path, case: int) -> None:
    edit, config, words = PER_EXPERT_REFUSALS[case]
    folder, _ = per_expert(tmp_path / "a", **config)
    edit_weights(folder, edit)
    text = "; ".join(refusal(folder, make_schema(), NATURAL))
    assert all(word in text for word in words), text


DOWN, GATE_UP = "lora_A", "base_layer.lora_A"
FUSED_REFUSALS: list[tuple[Callable[[dict[str, torch.Tensor]], Any], dict[str, Any], list[str]]] = [
    (
        put(GATE_UP, torch.zeros(8 * 3, HIDDEN)),
        {},
        ["has shape [24, 16], expected [12, 16] for gate_up_proj of 4 experts with rank 3"],
    ),
    (put(DOWN, torch.zeros(10, INNER)), {}, ["expected [12, 12] for down_proj of 4 experts"]),
    (put(DOWN, torch.zeros(EXPERTS, 3, INNER)), {}, ["has shape [4, 3, 12]"]),
    (put(DOWN, torch.zeros(12, INNER, dtype=torch.bfloat16)), {}, ["down_proj mixes BF16 and F32"]),
    (put(DOWN, torch.full((12, INNER), math.nan)), {}, ["experts.lora_A.weight holds NaN"]),
    (
        drop("0.mlp.experts.base_layer.lora_B"),
        {},
        ["experts.base_layer has lora_A but not its other"],
    ),
    (
        drop("0.mlp.experts.base_layer"),
        {},
        ["layers.0.mlp.experts.gate_up_proj, but the file has no"],
    ),
    (drop("0.mlp.experts.lora"), {}, ["layers.0.mlp.experts.down_proj, but the file has no"]),
    (
        rename("experts.base_layer", "experts.base_layer.base_layer"),
        {},
        ["experts.base_layer.base_layer is in the file, but of the parameters of"],
    ),
    (rename("mlp.experts", "mlp.moe.experts"), {}, ["no linear 'model.layers.0.mlp.moe.experts'"]),
    (put("gate_up_proj.lora_A", torch.zeros(12, HIDDEN)), {}, ["has no 'gate_up_proj'"]),
    (
        put("gate_proj.lora_A", torch.zeros(1, 3, HIDDEN)),
        {},
        ["gate_proj comes in two layouts: fused"],
    ),
    (
        lambda t: None,
        {"target_parameters": ["down_proj"]},
        ["experts.base_layer is in the file, but of the parameters of", "targets down_proj"],
    ),
    (lambda t: None, {"target_parameters": ["mlp.up_proj"]}, ["(mlp.up_proj) match nothing here"]),
    (lambda t: None, {"target_parameters": []}, ["the configuration targets none"]),
    (lambda t: None, {"target_parameters": "down_proj"}, ["target_parameters must be a list"]),
    (
        lambda t: None,
        {"rank_pattern": {"experts.down_proj": 2}},
        ["expected [8, 12] for down_proj"],
    ),
    (lambda t: None, {"rank_pattern": {"experts.down_proj": 20}}, ["--max-lora-rank 20"]),
]


@pytest.mark.parametrize("case", range(len(FUSED_REFUSALS)))
def test_refusals_of_fused_parameters(tmp_path: Path, case: int) -> None:
    edit, config, words = FUSED_REFUSALS[case]
    peft = {"target_modules": [], "target_parameters": TARGETS[0], "r": 3, "lora_alpha": 5}
    save(tmp_path, "qwen3", **peft)
    edit_config(tmp_path, **config)
    edit_weights(tmp_path, edit)
    text = "; ".join(refusal(tmp_path, make_schema(), MIXED))
    assert all(word in text for word in words), text


SHARED_REFUSALS: list[
    tuple[Callable[[dict[str, torch.Tensor]], Any], dict[str, Any], list[str]]
] = [
    (
        put("w1.lora_A", torch.zeros(2, 3, HIDDEN)),
        {},
        ["expected [1, 3, 16] or [4, 3, 16] for gate_proj"],
    ),
    (put("w1.lora_A", torch.zeros(3, HIDDEN)), {}, ["has shape [3, 16], expected [1, 3, 16]"]),
    (drop("0.mlp.experts.w3.lora_B"), {}, ["experts.w3 has lora_A but not its other half"]),
    (drop("0.mlp.experts.w3"), {}, ["targets model.layers.0.mlp.experts.w3, but the file"]),
    (
        lambda t: None,
        {"target_modules": ["w1", "w3"]},
        ["does not target model.layers.0.mlp.experts.w2"],
    ),
    (lambda t: None, {"r": 2}, ["expected [1, 2, 16] or [4, 2, 16]"]),
]


@pytest.mark.parametrize("case", range(len(SHARED_REFUSALS)))
def test_refusals_of_shared_factors(tmp_path: Path, case: int) -> None:
    edit, config, words = SHARED_REFUSALS[case]
    folder = shared_outer(tmp_path / "a", **config)
    edit_weights(folder, edit)
    text = "; ".join(refusal(folder, make_schema(), SHARED))
    assert all(word in text for word in words), text


def test_all_reasons_come_at_once(tmp_path: Path) -> None:
    folder, _ = per_expert(tmp_path / "a", use_dora=True)
    edit_weights(folder, drop("0.mlp.experts.0.up_proj.lora_B"))
    edit_weights(folder, rename("1.mlp.experts.3", "1.mlp.experts.5"))
    edit_weights(folder, drop("1.mlp.experts.2.gate_proj"))
    edit_weights(folder, put(GATE, torch.zeros(3, HIDDEN + 1)))
    text = "; ".join(refusal(folder, make_schema(per_expert=False)))
    for word in (
        "use_dora",
        "0.up_proj has lora_A but not",
        "no '5'",
        "this model has model.layers.0.mlp.experts",
        "has shape [3, 17]",
        "1.mlp.experts.2.gate_proj, but the file has no tensors",
        "--enable-mixed-moe-lora-format",
    ):
        assert word in text, word


def test_an_expert_without_tensors_has_no_lora(tmp_path: Path) -> None:
    """Though the configuration, by its suffixes, targets all of them."""
    folder, _ = per_expert(tmp_path / "a")
    edit_weights(folder, drop("1.mlp.experts.3"))
    weights, _ = read_adapter("a", folder, make_schema(), NATURAL, torch.float32)
    stored = weights.layout.experts["model.layers.1.mlp.experts.gate_proj"]
    assert stored.r.tolist().count(0) == 1 and stored.r[3] == 0
    edit_weights(folder, drop("1.mlp.experts"))
    assert "1.mlp.experts.0.gate_proj, but the file" in "; ".join(refusal(folder, make_schema()))


def test_experts_that_the_deployment_leaves_out(tmp_path: Path) -> None:
    folder, _ = per_expert(tmp_path / "a")
    whole = make_schema()
    kept = {name: spec for name, spec in whole.modules.items() if not name.endswith("up_proj")}
    reason = "the deployment leaves this module out"
    refused = {name: reason for name in whole.modules if name.endswith("up_proj")}
    text = "; ".join(refusal(folder, ModelSchema(kept, refused, whole.experts, whole.aliases)))
    assert f"experts.0.up_proj: {reason}" in text and "gate_proj" not in text
    kept = {name: spec for name, spec in whole.modules.items() if not spec.experts}
    none = ModelSchema(kept, dict.fromkeys(whole.experts, "no experts today"), {}, {})
    assert "no experts today" in refusal(folder, none)[0]


def test_values_that_overflow(tmp_path: Path) -> None:
    folder, _ = per_expert(tmp_path / "a")
    edit_weights(folder, put("2.up_proj.lora_A", torch.full((3, HIDDEN), 1e6)))
    with pytest.raises(
        AdapterRejected, match=r"experts\.2\.up_proj\.lora_A\.weight overflows"
    ) as caught:
        read(folder, make_schema(), NATURAL, torch.float16)
    assert len(caught.value.reasons) == 1


def test_the_report_has_a_line_for_experts_that_are_alike(tmp_path: Path) -> None:
    folder, factors = per_expert(tmp_path / "a")
    _, report = read_adapter("a", folder, make_schema(), NATURAL, torch.float32)
    assert len(report.rows) == 2 * len(factors) and report.num_modules == LAYERS * 3
    lines = report.format().splitlines()
    assert len(lines) == 2 + LAYERS * 3 * 2 and sum("4 experts" in line for line in lines) == 12
    assert f"{2 * len(factors)} tensors bind to 6 modules" in lines[-1]
    assert set(report.unadapted) == {m for m in make_schema().modules if "experts" not in m}


def test_a_pattern_for_each_of_many_modules_is_looked_up(tmp_path: Path) -> None:
    """As `rank_pattern` of an EVA adapter is: a thousand expressions a module would take minutes."""
    folder, factors = per_expert(tmp_path / "a")
    names = [f"model.layers.{n // 64}.mlp.experts.{n % 64}.gate_proj" for n in range(4096)]
    edit_config(folder, rank_pattern=dict.fromkeys(names, 3) | {"gate.proj": 9}, r=3)
    assert_same(deltas(read(folder, make_schema(), NATURAL)), reference(factors, 5 / 3))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return list(layouts(tmp_path_factory.mktemp("fuzz")).values())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_damage_is_a_typed_refusal_or_accepted(
    originals: list[Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = Path(
        shutil.copytree(data.draw(st.sampled_from(originals)), tmp_path_factory.mktemp("f") / "a")
    )
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for _ in range(data.draw(st.integers(1, 4))):
        key = data.draw(st.sampled_from(sorted(tensors)))
        tensor = tensors.pop(key)
        old, new = data.draw(
            st.sampled_from(
                [
                    ("experts.", "experts.base_layer."),
                    ("experts.1", "experts.2"),
                    ("gate_proj", "w1"),
                    ("mlp", "block_sparse_moe"),
                    ("w1.", ""),
                    ("lora_A", "lora_B"),
                    ("experts.", "experts.0."),
                ]
            )
        )
        shape = data.draw(
            st.sampled_from([tensor.shape, (1, *tensor.shape), tensor.shape[::-1], (0, 4)])
        )
        tensors[key.replace(old, new)] = torch.randn(shape)
    save_file(tensors, path)
    config = data.draw(st.sampled_from([NATURAL, SHARED, MIXED]))
    schema = make_schema(
        per_expert=data.draw(st.booleans()),
        interleaved=data.draw(st.booleans()),
        shares_a=data.draw(st.booleans()),
    )
    try:
        weights = read(folder, schema, config)
        assert all(delta.isfinite().all() for delta in deltas(weights).values())
    except AdapterRejected as error:
        assert error.reasons
    finally:
        shutil.rmtree(folder)
