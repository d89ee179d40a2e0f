"""Images on a GPU: the same tokens as on a CPU, which the parity tests compare with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loramux import LLM, LoRARequest, SamplingParams
from parity.multimodal import FAMILIES, random_image, save_adapter, save_model

FEW = ("llava", "qwen2.5-vl", "qwen3-vl", "gemma3")


def answers(folder: Path, device: str, adapters: dict[str, Path]) -> list[list[int]]:
    """Of a mixed batch, twice: what the first run left in the caches serves the second."""
    prompt = FAMILIES[folder.name].prompts["image"]
    prompts: list[Any] = [{"prompt": "only a text"}]
    loras: list[Any] = [[]]
    for seed, parts in enumerate([[], *([part] for part in adapters), list(adapters)]):
        images = [random_image(seed), random_image(7)]
        text = f"look {prompt} and {prompt} say"
        prompts.append({"prompt": text, "multi_modal_data": {"image": images}})
        loras.append([LoRARequest(p, lora_path=str(adapters[p]), scale=0.7) for p in parts])
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM(
        str(folder),
        device=device,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        kv_cache_memory="64MiB",
        enable_lora=True,
        enable_tower_connector_lora=True,
        max_loras=3,
        max_lora_rank=8,
    ) as llm:
        runs = [llm.generate(prompts, params, lora_request=loras) for _ in range(2)]
        llm.engine.check_integrity()
    first, second = ([answer.outputs[0].token_ids for answer in run] for run in runs)
    assert first == second
    return first


@pytest.mark.gpu
@pytest.mark.parametrize("name", FEW)
def test_the_gpu_answers_as_the_cpu_does(name: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / name, name)
    parts = [part for part, how in FAMILIES[name].parts.items() if "target_parameters" not in how]
    adapters = {
        part: save_adapter(folder, tmp_path / part, part, seed=seed)
        for seed, part in enumerate(parts[:3])
    }
    there = answers(folder, "cuda", adapters)
    assert there == answers(folder, "cpu", adapters)
    assert len({tuple(ids) for ids in there}) > 2
