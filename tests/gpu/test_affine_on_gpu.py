"""DoRA and trained biases on a GPU, launched and replayed, answer as on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux import LLM, SamplingParams
from parity.oracle import requests_for
from tiny import save_adapter, save_model

ADAPTERS = {
    "plain": {"r": 4},
    "dora": {"r": 5, "use_dora": True},
    "biases": {"r": 4, "bias": "all", "target_modules": ["q_proj", "down_proj"]},
    "bias of B": {"r": 2, "lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
}
COMPOSITIONS: list[dict[str, float]] = [
    {},
    {"plain": 1.0},
    {"dora": 1.0},
    {"biases": 1.0},
    {"bias of B": 1.0},
    {"plain": 0.7, "dora": 1.0},
    {"dora": 1.0, "plain": 0.7},
    {"dora": 1.0},
]
PROMPTS = [list(range(5 + i, 25 + 3 * i)) for i in range(len(COMPOSITIONS))]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama-bias", "phi3"])
def test_the_gpu_answers_as_the_cpu_does(tmp_path: Path, family: str) -> None:
    model = save_model(tmp_path / "model", family)
    adapters = {
        name: settings
        for name, settings in ADAPTERS.items()
        if family == "llama-bias" or not {"bias", "lora_bias"} & settings.keys()
    }
    paths = {
        name: save_adapter(model, tmp_path / name, seed=seed, **settings)
        for seed, (name, settings) in enumerate(adapters.items())
    }
    asked = [c for c in COMPOSITIONS if c.keys() <= paths.keys()]
    wanted = _answers(model, paths, asked, device="cpu")
    for settings in ({"enforce_eager": True}, {}, {"max_loras": 2, "max_num_batched_tokens": 32}):
        assert _answers(model, paths, asked, device="cuda", **settings) == wanted, settings


def _answers(
    model: Path, paths: dict[str, Path], asked: list[dict[str, float]], **settings: object
) -> list[tuple[int, ...]]:
    known = {"dtype": "float32", "max_loras": 5, "max_lora_rank": 16, "max_num_seqs": 8}
    known |= {"kv_cache_memory_bytes": 64 << 20, "adapter_patience_s": 0.02, **settings}
    with LLM(str(model), enable_lora=True, **known) as llm:
        loras = requests_for(paths, asked)
        outputs = llm.generate(PROMPTS[: len(asked)], GREEDY, lora_request=loras)
        llm.engine.check_integrity()
    return [tuple(output.outputs[0].token_ids) for output in outputs]
