"""What a mixture-of-experts model is to adapters, and what is refused, without running it much."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from loramux import LLM, LoRARequest, SamplingParams
from loramux.config.neutral import drop_neutral
from loramux.errors import AdapterRejected, ConfigError, UnsupportedModel
from loramux.layers.experts import Experts
from loramux.llm import check_adapter
from parity.moe import make_adapter, save_moe
from tiny import TinyWorld

SETTINGS = {"device": "cpu", "max_model_len": 64, "kv_cache_memory_bytes": 8 << 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_moe(tmp_path_factory.mktemp("experts") / "model", "qwen3_moe")


def test_an_adapter_is_checked_without_weights(model: Path, tmp_path: Path) -> None:
    made = make_adapter(model, tmp_path / "a", "per_expert", seed=1, router="mlp.gate")
    report = check_adapter(str(made.path), str(model))
    bound = {row.module for row in report.rows}
    assert "model.layers.2.mlp.experts.up_proj" in bound and "model.layers.0.mlp.gate" in bound
    assert not [name for name in report.unadapted if "mlp" in name]


def test_other_layouts_are_refused_with_the_setting_that_serves_them(
    model: Path, tmp_path: Path
) -> None:
    fused = make_adapter(model, tmp_path / "fused", "fused", seed=1)
    outer = make_adapter(model, tmp_path / "outer", "outer", seed=2)
    with LLM(str(model), enable_lora=True, **SETTINGS) as llm:
        for made, setting in ((fused, "mixed-moe-lora-format"), (outer, "moe-shared-loras")):
            with pytest.raises(AdapterRejected, match=f"--enable-{setting}"):
                llm.add_lora(LoRARequest("a", 1, str(made.path)))
    with LLM(str(model), enable_lora=True, enable_moe_shared_loras=True, **SETTINGS) as llm:
        llm.add_lora(LoRARequest("a", 1, str(outer.path)))
        with pytest.raises(AdapterRejected, match="--enable-mixed-moe-lora-format"):
            llm.add_lora(LoRARequest("b", 2, str(fused.path)))


def test_experts_that_are_no_targets_are_refused(model: Path, tmp_path: Path) -> None:
    made = make_adapter(model, tmp_path / "a", "per_expert", seed=1, linears=("q_proj",))
    settings = {**SETTINGS, "target_modules": ["q_proj", "gate"]}
    with LLM(str(model), enable_lora=True, **settings) as llm:
        assert llm.engine.runner.attached.experts[:1] == []
        with pytest.raises(AdapterRejected, match="target_modules leave it out"):
            llm.add_lora(LoRARequest("a", 1, str(made.path)))


def test_projections_that_are_no_targets_are_refused(model: Path, tmp_path: Path) -> None:
    made = make_adapter(model, tmp_path / "a", "per_expert", seed=1, linears=("k_proj",))
    settings = {**SETTINGS, "target_modules": ["experts.gate_proj", "experts.up_proj"]}
    with LLM(str(model), enable_lora=True, **settings) as llm:
        with pytest.raises(AdapterRejected, match="target_modules leave it out") as refusal:
            llm.add_lora(LoRARequest("a", 1, str(made.path)))
        assert "down_proj" in str(refusal.value) and "k_proj" in str(refusal.value)
        assert "experts.0.gate_proj" not in str(refusal.value)
        assert llm.generate(["a"], SamplingParams(max_tokens=1))[0].outputs[0].token_ids


def test_a_dense_model_says_that_the_setting_means_nothing(
    tiny_world: TinyWorld, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "loramux"),
        LLM(str(tiny_world.model), enable_lora=True, enable_mixed_moe_lora_format=True, **SETTINGS),
    ):
        pass
    assert len([r for r in caplog.records if "has no experts" in r.getMessage()]) == 1


def test_experts_that_compute_something_else_are_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(self: Experts, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return 2 * forward(self, x, *others)

    forward = Experts.forward
    monkeypatch.setattr(Experts, "forward", twice)
    with pytest.raises(UnsupportedModel, match="differs from its own forward"):
        LLM(str(model), **SETTINGS)


def test_expert_parallelism_is_refused_by_name() -> None:
    assert drop_neutral({"enable_expert_parallel": False, "seed": 1}) == {"seed": 1}
    with pytest.raises(ConfigError, match="enable_expert_parallel=True is not served"):
        drop_neutral({"enable_expert_parallel": True})
