"""GPT-OSS against PEFT: sinks of a size that counts, windows shorter than the prompts, experts that
transformers runs; adapters on the linears of attention, in mixed batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loramux import LLM, SamplingParams
from loramux.engine import engine
from loramux.engine.gpu_runner import GpuRunner
from loramux.kernels import dispatch, reference
from parity.oracle import assert_logprobs_equal, make_case, requests_for

COUNT = 8
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "odd": {"r": 7, "use_rslora": True},
    "some": {"r": 3, "target_modules": ["o_proj", "k_proj"]},
}
COMPOSITIONS: list[dict[str, float]] = [
    {},
    {"plain": 1.0},
    {"odd": 1.0},
    {"some": 1.0},
    {"plain": 0.7, "odd": -0.5},
    {},
]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("gpt-oss")
    return make_case(root, "gpt-oss", ADAPTERS, COMPOSITIONS, 45, COUNT)


def _answer_as_peft(case, **settings: Any) -> None:
    model, paths, prompts, expected, oracle = case
    settings = {"max_loras": 3, "max_lora_rank": 8, "device": "cpu", **settings}
    with LLM(str(model), enable_lora=True, **settings) as llm:
        params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=2)
        outputs = llm.generate(prompts, params, lora_request=requests_for(paths, COMPOSITIONS))
        attentions = llm.engine.runner.attached.attentions
        llm.engine.check_integrity()
    assert [o.outputs[0].token_ids for o in outputs] == expected
    for output, prompt, composition in zip(outputs, prompts, COMPOSITIONS, strict=True):
        assert_logprobs_equal(output.outputs[0], prompt, composition, oracle)
    assert [attention.kind[1] for attention in attentions] == [16, 0, 16, 0]
    assert all(attention.sinks is not None for attention in attentions)


def test_sinks_decide_the_answers(case) -> None:
    """Else the tests below would show nothing."""
    _, _, prompts, expected, oracle = case
    assert max(len(prompt) for prompt in prompts) > 32
    kept = {name: p.clone() for name, p in oracle.base.named_parameters() if "sinks" in name}
    try:
        with torch.no_grad():
            for name, parameter in oracle.base.named_parameters():
                if name in kept:
                    parameter.fill_(-1e4)
        without = [
            oracle.greedy(prompt, composition, COUNT)
            for prompt, composition in zip(prompts, COMPOSITIONS, strict=True)
        ]
    finally:
        oracle.base.load_state_dict(kept, strict=False)
    assert all(mine != theirs for mine, theirs in zip(without, expected, strict=True))


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 16, "max_loras": 2, "adapter_patience_s": 0.02}],
    ids=["roomy", "chunked-evicting"],
)
def test_answers_equal_peft(case, settings: dict[str, Any]) -> None:
    _answer_as_peft(case, **settings)


class TritonAttention:
    """The twins, with what GPUs have for the KV cache."""

    def __init__(self) -> None:
        triton_attention = pytest.importorskip("loramux.kernels.triton_attention")
        triton_kv = pytest.importorskip("loramux.kernels.triton_kv")
        self.paged_attention = triton_attention.paged_attention
        self.write_kv = triton_kv.write_kv

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)


def test_the_packed_steps_of_gpus_equal_peft(case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs, where nothing is captured, with Triton's attention."""
    if torch.cuda.is_available():
        pytest.skip("Triton does not interpret here")
    ops = TritonAttention()
    monkeypatch.setattr(dispatch, "backend", lambda device: ops)
    monkeypatch.setattr(engine, "make_runner", GpuRunner)
    # Interpreted, the warm-up of large steps takes long.
    few = {"max_num_seqs": 6, "max_num_batched_tokens": 64, "max_model_len": 64}
    _answer_as_peft(case, async_scheduling=True, **few)
