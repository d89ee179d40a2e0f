"""`loramux plan`: the memory table of a start, from the model's configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from loramux import LLM
from loramux.cli import main
from loramux.config import EngineConfig, LoRAConfig, MemoryPlan
from loramux.config.sizes import format_size
from loramux.engine import plan_start
from loramux.engine.plan_start import plan_before_start
from loramux.models import loader
from loramux.models.device_memory import DeviceMemory
from ranks import thread_ranks  # noqa: F401
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
    assert "64 adapters of rank 8: 512 rows" in table and "2.8 GiB" in table
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


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("fully", [False, True], ids=["default", "fully"])
@pytest.mark.parametrize("size", [2, 4], ids=["KV heads dealt out", "KV heads on several ranks"])
def test_it_tells_what_each_of_several_ranks_then_finds(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch, size: int, fully: bool
) -> None:
    monkeypatch.setattr(plan_start, "device_memory", lambda device: DeviceMemory(1 << 30))
    monkeypatch.setattr(loader, "device_memory", lambda device: DeviceMemory(1 << 30))
    settings = {"device": "cpu", "kv_cache_memory": "1MiB", "tensor_parallel_size": size}
    lora = {"max_loras": 3, "max_lora_rank": 10, "fully_sharded_loras": fully}
    config = EngineConfig(model=str(tiny_world.model), lora=LoRAConfig(**lora), **settings)
    planned = plan_before_start(config)
    with LLM(str(tiny_world.model), enable_lora=True, **settings, **lora) as llm:
        found = llm.engine.memory
        sites = llm.engine.runner.attached.sites
        pools = [p for s in sites for p in (s.site, s.dealt_site) if p is not None]
        pool = sum(p.a.nbytes + p.b.nbytes for p in pools)
        pool += sum(s.affine.nbytes for s in sites)  # places for gains and shifts
    assert planned.num_ranks == found.num_ranks == size
    assert planned.needs == found.needs
    assert planned.needs.pool == pool
    assert planned.num_blocks == found.num_blocks
    assert planned.kv_bytes_per_token == found.kv_bytes_per_token
    assert abs(planned.weight_bytes - found.weight_bytes) <= 0.01 * found.weight_bytes


def test_llama_on_several_gpus(
    llama_8b: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    config = EngineConfig(model=llama_8b, lora=LoRAConfig(max_loras=64, max_lora_rank=16))
    whole = plan_before_start(config, H200_BYTES)

    def each(size: int, fully: bool) -> MemoryPlan:
        lora = config.lora.model_copy(update={"fully_sharded_loras": fully})
        more = {"tensor_parallel_size": size, "lora": lora}
        return plan_before_start(config.model_copy(update=more), H200_BYTES)

    for size in (2, 8):
        assert each(size, False).weight_bytes == pytest.approx(whole.weight_bytes / size, rel=0.02)
        # Gains and shifts of row layers are whole on each rank.
        assert each(size, True).needs.pool == pytest.approx(whole.needs.pool / size, rel=0.15)
        assert whole.needs.pool // size < each(size, False).needs.pool < whole.needs.pool
        assert each(size, False).kv_bytes_per_token == whole.kv_bytes_per_token // size
    # 8 KV heads on 16 ranks: each on two.
    assert each(16, False).kv_bytes_per_token == whole.kv_bytes_per_token // 8
    line = ["plan", llama_8b, "--device-memory", str(H200_BYTES), "--tensor-parallel-size", "8"]
    assert main([*line, "--adapters", "64", "--rank", "16"]) == 0
    table = capsys.readouterr().out
    fully = format_size(each(8, True).needs.pool)
    assert "for each of 8 ranks" in table
    assert f"With --fully-sharded-loras the adapter pool takes {fully} a rank." in table
    assert main(["plan", llama_8b, "--device-memory", "80GB", "--tensor-parallel-size", "3"]) == 2
    assert "heads cannot be dealt out evenly to 3 ranks" in capsys.readouterr().err


def test_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--adapters", "2"]) == 2
    assert "loramux plan MODEL" in capsys.readouterr().err
