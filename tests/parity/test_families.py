"""Every served family against PEFT: mixed batches, compositions, chunks, small pools."""

from __future__ import annotations

import pytest

from loramux import LLM, SamplingParams
from parity.oracle import assert_logprobs_equal, make_case, requests_for
from tiny import FAMILIES

COUNT = 12
ADAPTERS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 8, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": {"o_proj": 5, r"layers\.1\..*down_proj": 7},
        "alpha_pattern": {"o_proj": 9},
    },
    "some": {"r": 3, "lora_alpha": 6, "target_modules": ["o_proj", "down_proj"]},
    "layers": {
        "r": 1,
        "lora_alpha": 2,
        "layers_to_transform": [1],
        "exclude_modules": ["down_proj"],
    },
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "dora some": {
        "r": 2,
        "lora_alpha": 1,
        "use_dora": True,
        "target_modules": ["o_proj", "down_proj"],
    },
}
# What each request of the mixed batch asks for.
COMPOSITIONS: list[dict[str, float]] = [
    {},
    {"plain": 1.0},
    {"rslora": 1.0},
    {"patterns": 1.0},
    {},
    {"some": 1.0},
    {"layers": 1.0},
    {"plain": 0.7, "rslora": 1.0},
    {"patterns": -0.5, "some": 2.0, "layers": 1.0},
    {"plain": 0.3},
    {"dora": 1.0},
    {"dora some": 1.0},
    {"plain": 0.7, "dora": 1.0},
    {"dora some": 1.0, "rslora": 1.0},
    {"dora": 1.0, "some": 0.5, "dora some": 1.0},
]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp(request.param)
    return make_case(root, request.param, ADAPTERS, COMPOSITIONS, 45, COUNT)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_loras": 5, "max_lora_rank": 8},
        {
            "max_loras": 3,
            "max_lora_rank": 8,
            "max_num_batched_tokens": 16,
            "adapter_patience_s": 0.02,
        },
        {"max_loras": 3, "max_lora_rank": 9, "block_size": 4, "num_tokens_of_kv": 320},
    ],
    ids=["roomy", "chunked-evicting", "preempting"],
)
def test_greedy_tokens_equal_peft(case, settings) -> None:
    model, paths, prompts, expected, _ = case
    settings = dict(settings)
    if tokens := settings.pop("num_tokens_of_kv", None):
        from loramux.config import EngineConfig
        from loramux.models.loader import load_model

        per_token = load_model(
            EngineConfig(model=str(model), device="cpu")
        ).facts.kv_bytes_per_token
        settings |= {"kv_cache_memory_bytes": tokens * per_token, "max_model_len": 64}
    with LLM(str(model), enable_lora=True, device="cpu", **settings) as llm:
        params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
        outputs = llm.generate(prompts, params, lora_request=requests_for(paths, COMPOSITIONS))
        assert [o.outputs[0].token_ids for o in outputs] == expected
        again = llm.generate(prompts, params, lora_request=requests_for(paths, COMPOSITIONS))
        assert [o.outputs[0].token_ids for o in again] == expected
        llm.engine.check_integrity()
    assert len({tuple(tokens) for tokens in expected}) > 4, "the adapters do not differ"


def test_logprobs_equal_peft(case) -> None:
    model, paths, prompts, _, oracle = case
    with LLM(str(model), enable_lora=True, device="cpu", max_loras=5, max_lora_rank=8) as llm:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=5)
        outputs = llm.generate(prompts, params, lora_request=requests_for(paths, COMPOSITIONS))
    for output, prompt, composition in zip(outputs, prompts, COMPOSITIONS, strict=True):
        assert_logprobs_equal(output.outputs[0], prompt, composition, oracle)
