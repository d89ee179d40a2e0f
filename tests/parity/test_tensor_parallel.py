"""Sharded over ranks, with either LoRA sharding, the answers are PEFT's: mixed batches, compositions,
loads and evictions, on gloo."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from loramux import LLM, LoRARequest, SamplingParams
from parity.oracle import Oracle
from ranks import thread_ranks  # noqa: F401
from tiny import VOCAB, save_adapter, save_model

COUNT = 6
ADAPTERS = {"plain": 4, "odd": 7, "five": 5}
COMPOSITIONS: list[dict[str, float]] = [
    {},
    {"plain": 1.0},
    {"odd": 1.0},
    {"five": -0.5},
    {"plain": 0.7, "odd": 1.0},
]
SETTINGS = {"max_loras": 2, "max_lora_rank": 7, "adapter_patience_s": 0.02, "device": "cpu"}


@pytest.fixture(scope="module", params=["llama", "llama-bias", "qwen3", "gemma3", "phi3"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp(request.param)
    model = save_model(root / "model", request.param)
    paths = {
        name: save_adapter(model, root / name, seed=seed + 1, r=r)
        for seed, (name, r) in enumerate(ADAPTERS.items())
    }
    rng = random.Random(5)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(5, 30))] for _ in COMPOSITIONS]
    oracle = Oracle(model, paths)
    expected = [oracle.greedy(p, c, COUNT) for p, c in zip(prompts, COMPOSITIONS, strict=True)]
    return model, paths, prompts, expected, oracle


def _requests(paths: dict[str, Path]) -> list[list[LoRARequest]]:
    return [
        [LoRARequest(name, 1, str(paths[name]), scale=scale) for name, scale in c.items()]
        for c in COMPOSITIONS
    ]


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("fully", [False, True], ids=["default", "fully"])
@pytest.mark.parametrize("size", [2, 4])
def test_answers_equal_peft(case, size: int, fully: bool) -> None:
    model, paths, prompts, expected, oracle = case
    settings = SETTINGS | {"tensor_parallel_size": size, "fully_sharded_loras": fully}
    with LLM(str(model), enable_lora=True, **settings) as llm:
        params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=2)
        outputs = llm.generate(prompts, params, lora_request=_requests(paths))
        assert [o.outputs[0].token_ids for o in outputs] == expected
        assert llm.engine.stats().device_evictions > 0
        llm.engine.check_integrity()
    for output, prompt, composition in zip(outputs, prompts, COMPOSITIONS, strict=True):
        answer = output.outputs[0]
        tokens = [*prompt, *answer.token_ids]
        wanted = oracle.logits(tokens[:-1], composition).log_softmax(-1)[len(prompt) - 1 :]
        for step, entry in enumerate(answer.logprobs or []):
            for token, item in entry.items():
                assert item.logprob == pytest.approx(float(wanted[step, token]), abs=2e-3)
