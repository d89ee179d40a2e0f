"""`loramux plan`: the memory table of a start, from the model's configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from loramux import LLM
from loramux.cli import main
from loramux.config import EngineConfig, LoRAConfig
from loramux.engine import plan_start
from loramux.engine.plan_start import plan_before_start
from loramux.models.device_memory import DeviceMemory
from tiny import TinyWorld

H200_BYTES = 150_110_011_392


@pytest.fixture
def llama_8b(tmp_path: Path) -> str:
    """The configuration of Llama-3.1-8B: there are no weights to read."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        dtype="bfloat16",
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    return str(tmp_path)


def test_llama_on_an_h200(
    llama_8b: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    line = ["plan", llama_8b, "--device-memory", str(H200_BYTES)]
    assert main([*line, "--gpu-memory-utilization", "0.85"]) == 0
    table = capsys.readouterr().out
    assert "15.0 GiB" in table and "102.5 GiB" in table and "no adapters" in table
    assert main([*line, "--adapters", "64", "--rank", "8"]) == 0
    table = capsys.readouterr().out
    assert "64 adapters of rank 8: 512 rows" in table and "2.5 GiB" in table
    assert main([*line, "--kv-cache-memory", "130GiB"]) == 2
    assert "does not fit" in capsys.readouterr().err
    assert main(["plan", llama_8b, "--device-memory", "16GB"]) == 2
    assert "the weights take 15.0 GiB" in capsys.readouterr().err


def test_the_plan_is_at_least_what_vllm_has(llama_8b: str) -> None:
    config = EngineConfig(model=llama_8b, gpu_memory_utilization=0.85)
    plan = plan_before_start(config, H200_BYTES)
    assert plan.num_tokens >= 839_648 and plan.kv_bytes >= 102.5 * (1 << 30)


def test_it_tells_what_the_start_then_finds(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_start, "device_memory", lambda device: DeviceMemory(1 << 30))
    settings = {"device": "cpu", "kv_cache_memory": "1MiB"}
    planned = plan_before_start(
        EngineConfig(model=str(tiny_world.model), lora=LoRAConfig(max_loras=3), **settings)
    )
    with LLM(str(tiny_world.model), enable_lora=True, max_loras=3, **settings) as llm:
        found = llm.engine.memory
    assert planned.needs == found.needs
    assert planned.num_blocks == found.num_blocks
    assert planned.kv_bytes_per_token == found.kv_bytes_per_token
    # Its tables of angles are computed anew, and small buffers of the model's own go with them.
    assert abs(planned.weight_bytes - found.weight_bytes) <= 0.01 * found.weight_bytes


def test_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--adapters", "2"]) == 2
    assert "loramux plan MODEL" in capsys.readouterr().err
