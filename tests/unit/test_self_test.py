"""The self-test: it passes what is served right, against PEFT and without it, and fails every fault."""

from __future__ import annotations

import builtins
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux import LLM, LoRARequest
from loramux.adapters import store as store_module
from loramux.adapters.peft import read_adapter
from loramux.adapters.peft_deltas import PeftDeltas
from loramux.adapters.self_test import FileDeltas, check_deltas, refuse_differing
from loramux.adapters.weights import AdapterWeights, LoRAPair
from loramux.cli import main
from loramux.config import EngineConfig, LoRAConfig
from loramux.errors import AdapterRejected
from loramux.llm import check_deltas_of
from loramux.models.loader import load_schema
from loramux.schema import ModelSchema
from tiny import TinyWorld, save_adapter

LORA = LoRAConfig(max_lora_rank=8)
MODULE = "model.layers.1.mlp.up_proj"

SETTINGS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 6},
    {"r": 8, "use_rslora": True, "alpha_pattern": {"v_proj": 3}, "rank_pattern": {"o_proj": 2}},
    {"target_modules": "all-linear"},
    {"target_modules": r".*\.[12]\.mlp\.(up|down)_proj", "rank_pattern": {r"2\.mlp\.up_proj": 1}},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    {"alora_invocation_tokens": [5, 6]},
    {"use_dora": True, "r": 3, "lora_alpha": 5, "alpha_pattern": {"v_proj": 3}},
    {"lora_bias": True, "target_modules": ["q_proj", "down_proj"]},
]


@pytest.fixture(scope="module")
def schema(tiny_world: TinyWorld) -> ModelSchema:
    return load_schema(EngineConfig(model=str(tiny_world.model), lora=LORA)).schema


@pytest.fixture
def weights(tiny_world: TinyWorld, schema: ModelSchema) -> AdapterWeights:
    return read_adapter("a", tiny_world.adapters["a"], schema, LORA, torch.float32)[0]


def with_pair(weights: AdapterWeights, **changes: Any) -> AdapterWeights:
    """The same weights, but for one module."""
    other = AdapterWeights(weights.ref, weights.buffer, weights.source)
    pairs = dict(weights.pairs)
    pairs[MODULE] = dataclasses.replace(pairs[MODULE], **changes)
    other.__dict__["pairs"] = pairs
    return other


def faults(pair: LoRAPair) -> Iterator[dict[str, Any]]:
    """Ways of being served wrong."""
    bit = pair.a.clone()
    bit[0, 0] = torch.nextafter(bit[0, 0], torch.tensor(math.inf))
    yield {"a": bit}
    yield {"a": pair.a.flip(0)}
    yield {"b": pair.b * 1.0001}
    yield {"b": torch.zeros_like(pair.b)}
    yield {"scale": pair.scale * (1 + 1e-6)}
    yield {"scale": -pair.scale}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s))
def test_what_is_served_is_what_peft_computes(
    tiny_world: TinyWorld, tmp_path: Path, schema: ModelSchema, settings: Any, dtype: torch.dtype
) -> None:
    folder = save_adapter(tiny_world.model, tmp_path / "a", **settings)
    weights, report = read_adapter("a", folder, schema, LORA, dtype)
    refuse_differing(weights, schema.aliases)
    for wanted in (PeftDeltas(folder), FileDeltas(folder)):
        numbers = check_deltas(weights, schema.aliases, dtype, wanted)
        assert numbers.passed and len(numbers.errors) == report.num_modules
        name = "PEFT" if isinstance(wanted, PeftDeltas) else "float64 from the file"
        assert numbers.method.startswith(name) and "modules:" not in numbers.method
        assert name in numbers.format() and f"{numbers.worst[1]:.2e}" in numbers.format()
    if dtype == torch.float32:
        assert numbers.worst[1] < 1e-5


def test_both_references_agree(tiny_world: TinyWorld, tmp_path: Path) -> None:
    folder = save_adapter(tiny_world.model, tmp_path / "a", **SETTINGS[1])
    theirs, ours = PeftDeltas(folder), FileDeltas(folder)
    for name, (a, _) in ours.factors.items():
        x = torch.randn(3, a.shape[1], dtype=torch.float64)
        torch.testing.assert_close(theirs.delta(name, x), ours.delta(name, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("number", range(6))
def test_every_fault_is_found(
    weights: AdapterWeights, tiny_world: TinyWorld, schema: ModelSchema, number: int
) -> None:
    wrong = with_pair(weights, **list(faults(weights.pairs[MODULE]))[number])
    with pytest.raises(AdapterRejected, match=f"self-test: .*{MODULE}"):
        refuse_differing(wrong, schema.aliases)
    if number in (1, 3, 5):  # those that a delta in float32 shows
        wanted = PeftDeltas(tiny_world.adapters["a"])
        numbers = check_deltas(wrong, schema.aliases, torch.float32, wanted)
        assert not numbers.passed and numbers.worst[0] == MODULE and "FAILED" in numbers.format()


def test_a_module_that_is_left_out_is_found(weights: AdapterWeights, schema: ModelSchema) -> None:
    wrong = with_pair(weights)
    del wrong.pairs[MODULE]
    with pytest.raises(AdapterRejected, match="not served"):
        refuse_differing(wrong, schema.aliases)


def test_nan_is_no_small_error(weights: AdapterWeights, tiny_world: TinyWorld) -> None:
    b = weights.pairs[MODULE].b.clone()
    b[0, 0] = math.nan
    wanted = FileDeltas(tiny_world.adapters["a"])
    numbers = check_deltas(with_pair(weights, b=b), {}, torch.float32, wanted)
    assert not numbers.passed and numbers.errors[MODULE] == math.inf


def test_the_command(
    tiny_world: TinyWorld, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["adapter", "check", str(tiny_world.adapters["a"]), "--model", str(tiny_world.model)]
    assert main([*line, "--numeric"]) == 0
    assert "against PEFT" in capsys.readouterr().out
    plain = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "peft":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main([*line, "--numeric", "--lora-dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "against float64 from the file" in said and "passed" in said
    monkeypatch.setattr(FileDeltas, "scale", lambda self, name: 1.234)
    assert main([*line, "--numeric"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert main(line) == 0 and "worst" not in capsys.readouterr().out


def test_from_python(tiny_world: TinyWorld) -> None:
    numbers = check_deltas_of(str(tiny_world.adapters["b"]), str(tiny_world.model))
    assert numbers.passed and numbers.not_compared == 0


def test_an_engine_that_verifies(tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "device": "cpu"}
    plain = store_module.read_adapter

    def wrong(*arguments: Any) -> Any:
        weights, report = plain(*arguments)
        return with_pair(weights, scale=weights.pairs[MODULE].scale * 2), report

    with LLM(str(tiny_world.model), verify_adapters=True, **settings) as llm:
        llm.add_lora(LoRARequest("a", 1, str(tiny_world.adapters["a"])))
        monkeypatch.setattr(store_module, "read_adapter", wrong)
        with pytest.raises(AdapterRejected, match="self-test"):
            llm.add_lora(LoRARequest("b", 2, str(tiny_world.adapters["b"])))
        assert [status.ref.name for status in llm.engine.adapters()] == ["a"]


def test_files_that_changed_meanwhile_are_refused(
    tiny_world: TinyWorld, schema: ModelSchema, tmp_path: Path
) -> None:
    folder = save_adapter(tiny_world.model, tmp_path / "a")
    weights, _ = read_adapter("a", folder, schema, LORA, torch.float32)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    with pytest.raises(AdapterRejected, match="scale"):
        refuse_differing(weights, schema.aliases)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterRejected, match="cannot read the files"):
        refuse_differing(weights, schema.aliases)


def test_dora_that_is_left_out_is_found(
    tiny_world: TinyWorld, tmp_path: Path, schema: ModelSchema
) -> None:
    folder = save_adapter(tiny_world.model, tmp_path / "a", use_dora=True)
    weights, _ = read_adapter("a", folder, schema, LORA, torch.float32)
    vectors = {k: v for k, v in weights.layout.vectors.items() if k != MODULE}
    layout = dataclasses.replace(weights.layout, vectors=vectors)
    source = dataclasses.replace(weights.source, layout=layout)
    wrong = dataclasses.replace(weights, source=source)
    numbers = check_deltas(wrong, schema.aliases, torch.float32, PeftDeltas(folder))
    assert not numbers.passed and numbers.worst[0] == MODULE
