"""Mixture-of-experts models on a GPU, adapters in every layout in one batch, against transformers in
float32: launched and captured steps, loads and evictions between them."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from loramux import LLM, SamplingParams
from parity.moe import MadeAdapter, MergedOracle, make_adapter, save_moe
from parity.oracle import Composition, assert_logprobs_equal, requests_for
from parity.test_experts import COUNT, MIXED, every_layout, prompts_for

SETTINGS = {"device": "cuda", "max_loras": 2, "max_lora_rank": 8, "adapter_patience_s": 0.02}
SETTINGS |= {"max_model_len": 128, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8}
SETTINGS |= {"enable_mixed_moe_lora_format": True}


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_answers_equal_transformers(tmp_path: Path, family: str, eager: bool) -> None:
    model = save_moe(tmp_path / "model", family)
    made = every_layout(tmp_path, model)
    router = "mlp.router" if family == "gpt_oss" else "mlp.gate"
    made["router"] = make_adapter(model, tmp_path / "r", "per_expert", seed=4, router=router)
    compositions = [*MIXED, {"router": 1.0}]
    oracle, outputs, prompts = _answers(model, made, compositions, "float32", eager=eager)
    for output, prompt, composition in zip(outputs, prompts, compositions, strict=True):
        answer = output.outputs[0]
        assert answer.token_ids == oracle.greedy(prompt, composition, COUNT)
        assert_logprobs_equal(answer, prompt, composition, oracle)  # type: ignore[arg-type]


@pytest.mark.multigpu
@pytest.mark.parametrize("fully", [False, True], ids=["default", "fully"])
def test_two_gpus_equal_transformers(tmp_path: Path, fully: bool) -> None:
    """Captured, collectives and all."""
    model = save_moe(tmp_path / "model", "qwen3_moe")
    made = every_layout(tmp_path, model)
    ranks = {"tensor_parallel_size": 2, "fully_sharded_loras": fully}
    oracle, outputs, prompts = _answers(model, made, MIXED, "float32", eager=False, **ranks)
    for output, prompt, composition in zip(outputs, prompts, MIXED, strict=True):
        assert output.outputs[0].token_ids == oracle.greedy(prompt, composition, COUNT)


@pytest.mark.gpu
def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    """Through the library's grouped product. Rounding may give a token to another expert: most agree."""
    model = save_moe(tmp_path / "model", "qwen3_moe")
    made = every_layout(tmp_path, model)
    oracle, outputs, prompts = _answers(model, made, MIXED, "bfloat16", eager=False)
    errors = []
    for output, prompt, composition in zip(outputs, prompts, MIXED, strict=True):
        answer = output.outputs[0]
        wanted = oracle.logits(prompt, composition)[-1].log_softmax(-1)  # [V]
        token = answer.token_ids[0]
        errors.append(abs(answer.logprobs[0][token].logprob - float(wanted[token])))
    assert statistics.median(errors) < 0.1


def _answers(
    model: Path,
    made: dict[str, MadeAdapter],
    compositions: list[Composition],
    dtype: str,
    *,
    eager: bool,
    **more: object,
) -> tuple[MergedOracle, list[Any], list[list[int]]]:
    prompts = prompts_for(compositions)
    paths = {name: adapter.path for name, adapter in made.items()}
    settings = {**SETTINGS, "dtype": dtype, "enforce_eager": eager, **more}
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=2)
    with LLM(str(model), enable_lora=True, **settings) as llm:
        requests = requests_for(paths, compositions)
        first = llm.generate(prompts, params, lora_request=requests)
        again = llm.generate(prompts, params, lora_request=requests)  # after loads and evictions
        llm.engine.check_integrity()
    assert [o.outputs[0].token_ids for o in first] == [o.outputs[0].token_ids for o in again]
    return MergedOracle(model, made), first, prompts
