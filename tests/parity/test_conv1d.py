"""GPT-2, whose linear layers are transformers' `Conv1D`: served as PEFT does, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from loramux import LLM, LoRARequest, SamplingParams
from loramux.adapters.convert import convert_adapter
from loramux.adapters.peft import read_adapter
from loramux.config import EngineConfig, LoRAConfig
from loramux.engine import engine
from loramux.engine.gpu_runner import GpuRunner
from loramux.errors import AdapterRejected, UnsupportedModel
from loramux.kernels import write_kv
from loramux.layers import attention
from loramux.models.loader import load_model, load_schema
from parity.oracle import Oracle, assert_logprobs_equal, requests_for
from tiny import VOCAB, save_adapter, tokenizer

COUNT, HIDDEN, INNER, LAYERS = 8, 32, 48, 3
LORA = LoRAConfig(max_lora_rank=8)
EVERY = ["c_attn", "c_proj", "c_fc"]  # `c_proj` is in the attention and in the MLP
ADAPTERS: dict[str, dict[str, Any]] = {
    "usual": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "unsaid": {"target_modules": EVERY, "r": 8, "use_rslora": True},  # PEFT corrects the flag
    "patterns": {
        "target_modules": EVERY,
        "r": 2,
        "rank_pattern": {"attn.c_proj": 5, r"h\.1\.mlp\.c_proj": 7},
        "alpha_pattern": {"mlp.c_proj": 9},
    },
    "all": {"target_modules": "all-linear", "fan_in_fan_out": True},
    "dora": {"target_modules": EVERY, "use_dora": True, "fan_in_fan_out": True},
    "biases": {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True},
}
COMPOSITIONS: list[dict[str, float]] = [
    {},
    {"usual": 1.0},
    {"dora": 1.0},
    {"biases": 1.0},
    {"unsaid": 1.0},
    {"patterns": 1.0},
    {"all": 1.0},
    {"usual": 0.7, "patterns": -1.5},
    {"unsaid": 0.3},
]
GREEDY = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=2)


def _save(folder: Path, **settings: Any) -> Path:
    sizes = {"n_embd": HIDDEN, "n_inner": INNER, "n_layer": LAYERS, "n_head": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB, "n_positions": 128}
    config = GPT2Config(**{**sizes, **ids, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("gpt2") / "model")


@pytest.fixture(scope="module")
def adapters(model: Path) -> dict[str, Path]:
    return {
        name: save_adapter(model, model.parent / name, seed=i + 1, **one)
        for i, (name, one) in enumerate(ADAPTERS.items())
    }


@pytest.fixture(scope="module")
def oracle(model: Path, adapters: dict[str, Path]) -> Oracle:
    return Oracle(model, adapters)


def _prompts() -> list[list[int]]:
    """One a composition, of which each begins as all others do."""
    lengths = torch.randint(2, 30, (len(COMPOSITIONS),)).tolist()
    start = torch.randint(3, VOCAB, (20,)).tolist()
    return [start + torch.randint(3, VOCAB, (length,)).tolist() for length in lengths]


def _open(model: Path, **settings: Any) -> LLM:
    more = {"device": "cpu", "dtype": "float32", "max_lora_rank": 8, **settings}
    return LLM(str(model), enable_lora=True, **more)


def _write_kv(*arguments: torch.Tensor) -> None:
    """The op of CPUs, with the slots of GPUs."""
    *tensors, slots = arguments
    write_kv(*tensors, slots.long())


@pytest.mark.parametrize("packed", [False, True], ids=["cpu", "packed"])
def test_answers_equal_peft(
    model: Path,
    adapters: dict[str, Path],
    oracle: Oracle,
    monkeypatch: pytest.MonkeyPatch,
    packed: bool,
) -> None:
    """In chunks, with few places for adapters, and twice: then out of the prefix cache."""
    if packed:
        monkeypatch.setattr(engine, "make_runner", GpuRunner)
        monkeypatch.setattr(attention, "write_kv", _write_kv)
    prompts, requests = _prompts(), requests_for(adapters, COMPOSITIONS)
    expected = [oracle.greedy(p, c, COUNT) for p, c in zip(prompts, COMPOSITIONS, strict=True)]
    settings = {"max_loras": 2, "max_num_batched_tokens": 16, "block_size": 8}
    with _open(model, **settings, adapter_patience_s=0.02) as llm:
        for cached in (0, 16):
            outputs = llm.generate(prompts, GREEDY, lora_request=requests)
            assert [o.outputs[0].token_ids for o in outputs] == expected
            assert all(o.num_cached_tokens >= cached for o in outputs)
        assert llm.engine.stats().device_evictions > 0
    for output, prompt, composition in zip(outputs, prompts, COMPOSITIONS, strict=True):
        assert_logprobs_equal(output.outputs[0], prompt, composition, oracle)


def _edit(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of an adapter with another configuration."""
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    target.mkdir()
    (target / "adapter_config.json").write_text(json.dumps(config))
    (target / "adapter_model.safetensors").write_bytes(
        (folder / "adapter_model.safetensors").read_bytes()
    )
    return target


def test_what_a_file_says_of_base_weights_changes_nothing(
    model: Path, adapters: dict[str, Path], oracle: Oracle, tmp_path: Path
) -> None:
    """Neither here nor in PEFT."""
    schema = load_schema(EngineConfig(model=str(model), device="cpu", lora=LORA)).schema
    wanted = oracle.logits([5, 6, 7], {"usual": 1.0})
    digests = set()
    for flag in (False, True):
        folder = _edit(adapters["usual"], tmp_path / str(flag), fan_in_fan_out=flag)
        digests.add(read_adapter("a", folder, schema, LORA, torch.float32)[0].ref.digest)
        assert torch.equal(Oracle(model, {"a": folder}).logits([5, 6, 7], {"a": 1.0}), wanted)
    assert len(digests) == 1


def test_checkpoints_without_prefix_and_head(
    model: Path, adapters: dict[str, Path], oracle: Oracle, tmp_path: Path
) -> None:
    """As the first checkpoints of GPT-2 are, with the masks that attention once kept."""
    _save(tmp_path, n_layer=LAYERS)
    tensors = load_file(model / "model.safetensors")
    old = {
        name.removeprefix("transformer."): t for name, t in tensors.items() if "lm_head" not in name
    }
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 128, 128).tril() for i in range(LAYERS)}
    assert "h.0.attn.c_attn.weight" in old
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    prompt, compositions = _prompts()[0], [{}, {"patterns": 1.0}]
    with _open(tmp_path) as llm:
        requests = requests_for(adapters, compositions)
        outputs = llm.generate([prompt] * 2, GREEDY, lora_request=requests)
    for output, composition in zip(outputs, compositions, strict=True):
        assert output.outputs[0].token_ids == oracle.greedy(prompt, composition, COUNT)


@pytest.mark.parametrize(
    "settings",
    [
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        {"scale_attn_weights": False, "activation_function": "relu"},
        {"n_inner": None, "tie_word_embeddings": False, "pad_token_id": 0},
    ],
    ids=["scaled-by-layer", "unscaled", "untied"],
)
def test_other_settings_of_the_family(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = _save(tmp_path / "model", **settings)
    path = save_adapter(model, tmp_path / "a", target_modules=EVERY)
    oracle, prompt = Oracle(model, {"a": path}), _prompts()[0]
    with _open(model) as llm:
        outputs = llm.generate(
            [prompt] * 2, GREEDY, lora_request=[None, LoRARequest("a", 1, str(path))]
        )
    for output, composition in zip(outputs, [{}, {"a": 1.0}], strict=True):
        assert_logprobs_equal(output.outputs[0], prompt, composition, oracle)


def test_the_schema_is_that_of_linear_layers(model: Path) -> None:
    config = EngineConfig(model=str(model), device="cpu", lora=LORA)
    loaded = load_model(config).attached
    assert load_schema(config).schema == loaded.schema
    sizes = {
        "attn.c_attn": (HIDDEN, 3 * HIDDEN),
        "attn.c_proj": (HIDDEN, HIDDEN),
        "mlp.c_fc": (HIDDEN, INNER),
        "mlp.c_proj": (INNER, HIDDEN),
    }
    found = {
        name: (spec.in_features, spec.out_features, spec.transposed)
        for name, spec in loaded.schema.modules.items()
    }
    assert found == {
        f"transformer.h.{layer}.{name}": (*size, True)
        for layer in range(LAYERS)
        for name, size in sizes.items()
    }
    assert set(loaded.schema.refused) == {"transformer.wte", "transformer.wpe", "lm_head"}


def test_random_weights_of_the_geometry(model: Path) -> None:
    with _open(model, load_format="dummy") as llm:
        assert len(llm.generate([[5, 6]], GREEDY)[0].outputs[0].token_ids) == COUNT


def test_what_is_not_served_is_named(model: Path, tmp_path: Path) -> None:
    crossed = _save(tmp_path / "crossed", add_cross_attention=True)
    with pytest.raises(UnsupportedModel, match="states of an encoder"):
        _open(crossed)
    with pytest.raises(UnsupportedModel, match="its layers c_attn, c_fc, c_proj are Conv1D"):
        _open(model, tensor_parallel_size=2)


def test_adapters_that_are_not_served_are_named(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    schema = load_schema(EngineConfig(model=str(model), device="cpu", lora=LORA)).schema

    def reasons(folder: Path) -> str:
        with pytest.raises(AdapterRejected) as caught:
            read_adapter("a", folder, schema, LORA, torch.float32)
        return "; ".join(caught.value.reasons)

    # PEFT adds B A to the weight as it lies: of a square one no shape would tell.
    named = {"target_modules": [], "target_parameters": ["attn.c_proj.weight"]}
    path = save_adapter(model, tmp_path / "parameters", **named, lora_dropout=0.0)
    assert "c_proj.weight, which a Conv1D layer holds transposed" in reasons(path)
    turned = _edit(adapters["usual"], tmp_path / "turned")
    tensors = load_file(turned / "adapter_model.safetensors")
    tensors = {name: tensor.t().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, turned / "adapter_model.safetensors")
    assert f"has shape [{HIDDEN}, 4], expected [4, {HIDDEN}]" in reasons(turned)
    pissa = _edit(adapters["usual"], tmp_path / "pissa", init_lora_weights="pissa")
    with pytest.raises(AdapterRejected, match="that lie transposed"):
        convert_adapter(str(pissa), str(tmp_path / "new"), base=str(model))
