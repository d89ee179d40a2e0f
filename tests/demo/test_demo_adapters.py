"""Every demo adapter, served by loramux, shows its behaviour on prompts it never saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from demo_data import BEHAVIOURS, Behaviour

ADAPTERS = Path(__file__).resolve().parents[2] / "examples" / "adapters"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Least share of held-out prompts that the adapter must pass, and the share the base must not reach.
ADAPTER_SHARE = 0.8
BASE_SHARE = 0.5

ALL = pytest.mark.parametrize("behaviour", BEHAVIOURS.values(), ids=lambda b: b.name)


@pytest.fixture(scope="module")
def pass_shares(demo_model_path: Path) -> dict[tuple[str, bool], float]:
    """Return the share of held-out prompts whose greedy answer passes its check.

    By behaviour and whether its adapter was asked. All are asked at once: batches mix the
    adapters with each other and with the base model.
    """
    from loramux import LLM, LoRARequest, SamplingParams

    asked = []  # (behaviour, adapter or none, prompt, check)
    for i, name in enumerate(BEHAVIOURS):
        adapter = LoRARequest(name, i + 1, str(ADAPTERS / name))
        for prompt, check in BEHAVIOURS[name].held_out():
            asked += [(name, adapter, prompt, check), (name, None, prompt, check)]
    with LLM(
        model=str(demo_model_path),
        enable_lora=True,
        max_loras=len(BEHAVIOURS),
        max_lora_rank=16,
    ) as llm:
        outputs = llm.chat(
            [[{"role": "user", "content": prompt}] for _, _, prompt, _ in asked],
            SamplingParams(temperature=0.0, max_tokens=48),
            lora_request=[adapter for _, adapter, _, _ in asked],
        )
    passed: dict[tuple[str, bool], list[bool]] = {}
    for (name, adapter, _, check), output in zip(asked, outputs, strict=True):
        passed.setdefault((name, adapter is not None), []).append(check(output.outputs[0].text))
    return {key: sum(of_key) / len(of_key) for key, of_key in passed.items()}


@ALL
def test_adapter_shows_its_behaviour(pass_shares, behaviour: Behaviour):
    assert pass_shares[behaviour.name, True] >= ADAPTER_SHARE


@ALL
def test_base_model_does_not_show_the_behaviour(pass_shares, behaviour: Behaviour):
    assert pass_shares[behaviour.name, False] < BASE_SHARE


def read_config(name: str) -> dict:
    """Return the `adapter_config.json` of an adapter."""
    return json.loads((ADAPTERS / name / "adapter_config.json").read_text(encoding="utf-8"))


@ALL
def test_adapter_folder_is_small_and_portable(behaviour: Behaviour):
    folder = ADAPTERS / behaviour.name
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    config = read_config(behaviour.name)
    assert config["base_model_name_or_path"] == BASE_MODEL
    assert config["inference_mode"] is True
    assert config["modules_to_save"] is None


def test_adapters_cover_the_kinds_of_lora():
    configs = [read_config(name) for name in BEHAVIOURS]
    assert {config["r"] for config in configs} == {4, 8, 16}
    assert len({tuple(config["target_modules"]) for config in configs}) >= 5
    assert any(config["use_rslora"] for config in configs)
    assert any(config["rank_pattern"] and config["alpha_pattern"] for config in configs)


def test_adapters_are_small_enough_to_ship():
    weights = ADAPTERS.glob("*/adapter_model.safetensors")
    assert sum(path.stat().st_size for path in weights) <= 12_000_000
