"""Sharded over ranks, with either LoRA sharding, the answers are PEFT's: mixed batches, compositions,
loads and evictions, on gloo."""

from __future__ import annotations

import pytest
import torch

from loramux import LLM, SamplingParams
from loramux.engine import engine, follower
from loramux.engine.gpu_runner import GpuRunner
from loramux.layers.sharded import ShardedLinear
from parity.oracle import assert_logprobs_equal, make_case, requests_for
from ranks import thread_ranks  # noqa: F401

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


@pytest.fixture(
    scope="module", params=["llama", "llama-bias", "qwen3", "gemma3", "phi3", "granite-swa"]
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp(request.param)
    return make_case(
        root,
        request.param,
        {name: {"r": r} for name, r in ADAPTERS.items()},
        COMPOSITIONS,
        30,
        COUNT,
    )


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("fully", [False, True], ids=["default", "fully"])
@pytest.mark.parametrize("size", [2, 4])
def test_answers_equal_peft(case, size: int, fully: bool) -> None:
    _answer_as_peft(case, tensor_parallel_size=size, fully_sharded_loras=fully)


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    "size, fully", [(2, False), (2, True), (4, True)], ids=["default", "fully", "fully-4"]
)
def test_the_packed_steps_of_gpus_equal_peft(case, monkeypatch, size: int, fully: bool) -> None:
    """On CPUs, where nothing is captured, a step ahead."""
    monkeypatch.setattr(engine, "make_runner", GpuRunner)
    monkeypatch.setattr(follower, "make_runner", GpuRunner)
    extended, real = [], ShardedLinear.extended_product

    def counted(self: ShardedLinear, x: torch.Tensor, rows: int) -> torch.Tensor:
        extended.append(self.kind)
        return real(self, x, rows)

    monkeypatch.setattr(ShardedLinear, "extended_product", counted)
    settings = {"tensor_parallel_size": size, "fully_sharded_loras": fully}
    _answer_as_peft(case, **settings, async_scheduling=True)
    assert {"column", "row"} <= set(extended)


def _answer_as_peft(case, **more: object) -> None:
    model, paths, prompts, expected, oracle = case
    with LLM(str(model), enable_lora=True, **SETTINGS, **more) as llm:
        params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=2)
        outputs = llm.generate(prompts, params, lora_request=requests_for(paths, COMPOSITIONS))
        assert [o.outputs[0].token_ids for o in outputs] == expected
        assert llm.engine.runner.attached.decoder is not None  # fused
        assert llm.engine.stats().device_evictions > 0
        llm.engine.check_integrity()
    for output, prompt, composition in zip(outputs, prompts, COMPOSITIONS, strict=True):
        assert_logprobs_equal(output.outputs[0], prompt, composition, oracle)
