"""Two ranks on two GPUs over NCCL answer as one does, with and without captured graphs; and two on one
GPU over gloo, without."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux import LLM, LoRARequest, SamplingParams
from loramux.engine import choosers
from loramux.engine.tuning import CostTable
from tiny import VOCAB, TinyWorld, save_adapter

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [list(range(5 + i, 25 + 3 * i)) for i in range(5)]


@pytest.fixture(scope="module")
def adapters(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three plain ones, and one with DoRA."""
    dora = save_adapter(tiny_world.model, tmp_path_factory.mktemp("dora"), r=6, use_dora=True)
    return [*(str(tiny_world.adapters[name]) for name in "abc"), str(dora)]


@pytest.mark.gpu
@pytest.mark.parametrize("fully", [False, True], ids=["default", "fully"])
def test_two_ranks_on_one_gpu_answer_as_one(
    tiny_world: TinyWorld, adapters: list[str], monkeypatch: pytest.MonkeyPatch, fully: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # of several, all take the first
    _compare(tiny_world, adapters, eager=True, fully=fully)


@pytest.mark.multigpu
@pytest.mark.parametrize("fully", [False, True], ids=["default", "fully"])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_two_gpus_answer_as_one(
    tiny_world: TinyWorld, adapters: list[str], eager: bool, fully: bool
) -> None:
    _compare(tiny_world, adapters, eager=eager, fully=fully)


@pytest.mark.multigpu
def test_steps_of_many_tokens_answer_as_one_gpu(tiny_world: TinyWorld, adapters: list[str]) -> None:
    """What is shrunk travels in the model's type there."""
    dice = random.Random(3)
    prompts = [[dice.randrange(3, VOCAB) for _ in range(230)] for _ in adapters * 2]
    assert sum(map(len, prompts)) > 1024 + 230
    _compare(tiny_world, [*adapters, *adapters], eager=False, fully=True, prompts=prompts)


@pytest.mark.multigpu
@pytest.mark.parametrize("fully", [False, True], ids=["default", "fully"])
def test_steps_of_16_bits_add_deltas_in_their_sums(
    tiny_world: TinyWorld, adapters: list[str], monkeypatch: pytest.MonkeyPatch, fully: bool
) -> None:
    """Sums of 16 bits differ from one GPU's, so likelihoods are compared for as long as tokens agree."""
    exchange = pytest.importorskip("loramux.parallel.exchange").Exchange
    calls = []
    real = exchange.sum_and_expand

    def counted(self: Any, z: torch.Tensor, *args: Any) -> Any:
        calls.append(z.shape)
        return real(self, z, *args)

    monkeypatch.setattr(exchange, "sum_and_expand", counted)
    product = CostTable((1,), (1,), ((0.0,),), ((1.0,),))  # rank 0 tells the others
    monkeypatch.setattr(choosers, "load_costs", lambda *_, **__: product)
    likely = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1)
    loras = [None, *(LoRARequest(Path(path).name, 1, path) for path in adapters[:3])]
    settings = {"device": "cuda", "dtype": "bfloat16", "max_loras": 4, "max_lora_rank": 8}
    settings |= {"max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}
    answers = []
    for ranks in (1, 2):
        more = {**settings, "tensor_parallel_size": ranks, "fully_sharded_loras": fully}
        with LLM(str(tiny_world.model), enable_lora=True, **more) as llm:
            outputs = llm.generate(PROMPTS[:4], likely, lora_request=loras)
        answers.append([_likelihoods(output.outputs[0]) for output in outputs])
        assert bool(calls) == (ranks == 2)
    agreed = 0
    for alone, together in zip(*answers, strict=True):
        for (token, likelihood), (other, found) in zip(alone, together, strict=True):
            assert abs(likelihood - found) < 0.1
            if token != other:
                break
            agreed += 1
    assert agreed >= 12


@pytest.mark.multigpu
def test_every_engine_of_a_process_has_mailboxes(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which torch counts those before, on rank 0 alone."""
    exchange = pytest.importorskip("loramux.parallel.exchange").Exchange
    calls: list[torch.Size] = []
    real = exchange.sum

    def counted(self: Any, parts: torch.Tensor, out: torch.Tensor) -> Any:
        calls.append(parts.shape)
        return real(self, parts, out)

    monkeypatch.setattr(exchange, "sum", counted)
    for _ in range(2):
        calls.clear()
        with LLM(str(tiny_world.model), device="cuda", tensor_parallel_size=2, enforce_eager=True):
            assert calls


def _likelihoods(output: Any) -> list[tuple[int, float]]:
    pairs = zip(output.token_ids, output.logprobs, strict=True)
    return [(token, of_step[token].logprob) for token, of_step in pairs]


def _compare(
    tiny_world: TinyWorld,
    adapters: list[str],
    *,
    eager: bool,
    fully: bool,
    prompts: list[list[int]] = PROMPTS,
) -> None:
    loras = [LoRARequest(Path(path).name, 1, path) for path in adapters]
    loras = [None, *loras][: len(prompts)]
    settings = {"device": "cuda", "dtype": "float32", "enforce_eager": eager, "max_loras": 4}
    settings |= {"max_num_batched_tokens": 2048}
    settings |= {"max_lora_rank": 8, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}
    with LLM(str(tiny_world.model), enable_lora=True, **settings) as llm:
        alone = llm.generate(prompts, GREEDY, lora_request=loras)
    settings |= {"tensor_parallel_size": 2, "fully_sharded_loras": fully}
    with LLM(str(tiny_world.model), enable_lora=True, **settings) as llm:
        together = llm.generate(prompts, GREEDY, lora_request=loras)
        llm.engine.check_integrity()
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]


ONCE = """
import sys
from loramux import LLM, SamplingParams
settings = dict(device="cuda", tensor_parallel_size=2, max_num_seqs=4, kv_cache_memory_bytes=1 << 26)
with LLM(sys.argv[1], **settings) as llm:
    llm.generate(["a"], SamplingParams(max_tokens=2))
    print("answered", flush=True)
"""


@pytest.mark.multigpu
def test_a_process_ends_when_its_graphs_had_collectives(tiny_world: TinyWorld) -> None:
    """A communicator waits for the graphs that it takes part in."""
    process = subprocess.Popen(
        [sys.executable, "-c", ONCE, str(tiny_world.model)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None  # where libraries may say something as well
        assert any(line == "answered\n" for line in process.stdout)
        assert process.wait(60) == 0
    finally:
        process.kill()
