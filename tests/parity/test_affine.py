"""DoRA and trained biases against PEFT: mixed in one batch, in sums, evicted, over ranks."""

from __future__ import annotations

import pytest

from loramux import LLM, SamplingParams
from loramux.engine import engine, follower
from loramux.engine.gpu_runner import GpuRunner
from loramux.errors import InvalidField
from parity.oracle import assert_logprobs_equal, make_case, requests_for
from ranks import thread_ranks  # noqa: F401

COUNT = 6
ADAPTERS = {
    "plain": {"r": 4},
    "dora": {"r": 5, "use_dora": True},
    "dora of some": {"r": 2, "use_dora": True, "target_modules": ["q_proj", "o_proj"]},
    "biases": {"r": 4, "bias": "all", "target_modules": ["q_proj", "v_proj"]},
    "own biases": {"r": 3, "bias": "lora_only", "target_modules": ["q_proj", "k_proj"]},
    "dora with biases": {"r": 2, "use_dora": True, "bias": "lora_only"},
    "bias of B": {"r": 2, "lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
}
COMPOSITIONS: list[dict[str, float]] = [
    {},
    {"plain": 1.0},
    {"dora": 1.0},
    {"dora of some": 1.0},
    {"biases": 1.0},
    {},
    {"own biases": 1.0},
    {"dora with biases": 1.0},
    {"bias of B": 1.0},
    {"plain": -0.5, "bias of B": 1.0},
    {"plain": 0.7, "dora": 1.0},
]
IN_TURN: list[dict[str, float]] = [
    {"dora": 1.0, "plain": 0.7},
    {"dora of some": 1.0, "plain": 0.5, "dora": 1.0},
]
SETTINGS = {"max_lora_rank": 7, "adapter_patience_s": 0.02, "device": "cpu"}


@pytest.fixture(scope="module", params=["llama-bias", "qwen2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp(request.param)
    return make_case(root, request.param, ADAPTERS, COMPOSITIONS + IN_TURN, 30, COUNT)


@pytest.mark.parametrize("max_loras", [8, 3])
def test_answers_equal_peft(case, max_loras: int) -> None:
    _answer_as_peft(case, COMPOSITIONS + IN_TURN, max_loras=max_loras, max_num_batched_tokens=16)


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("fully", [False, True], ids=["default", "fully"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_equal_peft(case, size: int, fully: bool) -> None:
    compositions = COMPOSITIONS if fully else COMPOSITIONS + IN_TURN
    settings = {"tensor_parallel_size": size, "fully_sharded_loras": fully}
    _answer_as_peft(case, compositions, max_loras=3, **settings)


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("fully", [None, False, True], ids=["alone", "default", "fully"])
def test_the_packed_steps_of_gpus_equal_peft(case, monkeypatch, fully: bool | None) -> None:
    monkeypatch.setattr(engine, "make_runner", GpuRunner)
    monkeypatch.setattr(follower, "make_runner", GpuRunner)
    settings = {} if fully is None else {"tensor_parallel_size": 2, "fully_sharded_loras": fully}
    compositions = COMPOSITIONS if fully else COMPOSITIONS + IN_TURN
    _answer_as_peft(case, compositions, max_loras=4, async_scheduling=True, **settings)


def test_what_is_not_linear_has_no_other_scale(case) -> None:
    model, paths, prompts, _, _ = case
    with LLM(str(model), enable_lora=True, max_loras=2, **SETTINGS) as llm:
        half = requests_for(paths, [{"dora": 0.5}])[0]
        with pytest.raises(InvalidField, match="which are not linear"):
            llm.generate([prompts[0]], SamplingParams(max_tokens=1), lora_request=[half])


@pytest.mark.usefixtures("thread_ranks")
def test_fully_sharded_an_adapter_with_gains_comes_last(case) -> None:
    model, paths, prompts, _, _ = case
    more = {"tensor_parallel_size": 2, "fully_sharded_loras": True, "max_loras": 2}
    with LLM(str(model), enable_lora=True, **SETTINGS, **more) as llm:
        first = requests_for(paths, IN_TURN[:1])[0]
        with pytest.raises(InvalidField, match="must be the last"):
            llm.generate([prompts[0]], SamplingParams(max_tokens=1), lora_request=[first])


def _answer_as_peft(case, compositions, **more: object) -> None:
    model, paths, prompts, expected, oracle = case
    count = len(compositions)
    with LLM(str(model), enable_lora=True, **SETTINGS, **more) as llm:
        params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=2)
        asked = requests_for(paths, compositions)
        outputs = llm.generate(prompts[:count], params, lora_request=asked)
        assert [o.outputs[0].token_ids for o in outputs] == expected[:count]
        llm.engine.check_integrity()
    for output, prompt, composition in zip(outputs, prompts, compositions, strict=False):
        assert_logprobs_equal(output.outputs[0], prompt, composition, oracle)
