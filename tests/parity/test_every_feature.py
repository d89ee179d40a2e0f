"""Every feature of PEFT's LoRA in one batch, against PEFT with each adapter alone: on a CPU, in the
packed and replayed steps of GPUs, over ranks with either sharding; qkv in three layers and in one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from gpu.replaying import CpuReplayingRunner
from loramux import LLM, SamplingParams
from loramux.engine import engine, follower
from loramux.engine.gpu_runner import GpuRunner
from parity.vocabularies import ADDED, VocabularyOracle, save_vocabulary
from ranks import thread_ranks  # noqa: F401
from tiny import VOCAB, save_adapter, save_model
from together import answered_together

COUNT = 4
GREEDY = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=2)
INVOCATION = [7, 9, 11]
QKV = {"llama-bias": ["q_proj", "k_proj", "v_proj"], "phi3": ["qkv_proj"]}
BIASED = {"llama-bias"}  # families whose layers have biases that can be trained
SETTINGS: dict[str, Any] = {
    "enable_lora": True,
    "device": "cpu",
    "max_loras": 4,
    "max_lora_rank": 8,
    "max_lora_vocabulary_rows": 16,
    "enable_vocabulary_lora": True,
    "adapter_patience_s": 0.02,
}


def _layers(qkv: list[str]) -> dict[str, dict[str, Any]]:
    """Adapters on layers alone."""
    return {
        "plain": {"r": 5},
        "rslora": {"r": 8, "use_rslora": True, "rank_pattern": {"o_proj": 2}},
        "dora": {"r": 4, "use_dora": True},
        "dora of some": {"r": 3, "use_dora": True, "target_modules": [qkv[0], "down_proj"]},
        "biases": {"r": 4, "bias": "all", "target_modules": qkv},
        "bias of B": {"r": 2, "lora_bias": True, "target_modules": qkv},
        "activated": {"r": 4, "alora_invocation_tokens": INVOCATION},
        "never invoked": {"r": 4, "alora_invocation_tokens": [12, 13, 14]},
    }


def _vocabularies(qkv: list[str]) -> dict[str, dict[str, Any]]:
    """Adapters that change the vocabulary as well."""
    return {
        "embedding": {"target_modules": [*qkv, "embed_tokens"]},
        "head": {"target_modules": ["o_proj", "lm_head"]},
        "copies": {"target_modules": qkv, "modules_to_save": ["embed_tokens", "lm_head"]},
        "tokens": {"target_modules": qkv, "trainable_token_indices": [5, 17, 300]},
        "dora with tokens": {
            "target_modules": [*qkv, "down_proj"],
            "use_dora": True,
            "trainable_token_indices": [5, 40],
        },
        "added": {"target_modules": qkv, "resize": VOCAB + ADDED},
    }


@dataclass(frozen=True)
class Asked:
    adapter: str | None
    prompt: list[int]
    expected: list[int]
    logprobs: torch.Tensor  # [COUNT, V]


@dataclass(frozen=True)
class Case:
    model: Path
    adapters: dict[str, Path]
    asked: list[Asked]


@pytest.fixture(scope="module", params=sorted(QKV))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, root = request.param, tmp_path_factory.mktemp(request.param)
    model, qkv = save_model(root / "model", family), QKV[request.param]
    layers, vocabularies = _layers(qkv), _vocabularies(qkv)
    if family not in BIASED:
        layers = {n: s for n, s in layers.items() if not {"bias", "lora_bias"} & s.keys()}
    adapters = {
        name: save_adapter(model, root / name, seed, **settings)
        for seed, (name, settings) in enumerate(layers.items())
    }
    adapters |= {
        name: save_vocabulary(model, root / name, seed, **settings)
        for seed, (name, settings) in enumerate(vocabularies.items())
    }
    oracle, dice = VocabularyOracle(model), random.Random()
    asked = []
    for name in [None, *adapters, None, "plain", "dora"]:
        size = vocabularies.get(name or "", {}).get("resize", VOCAB)
        prompt = [dice.randrange(15, size) for _ in range(dice.randrange(8, 30))]
        if name == "activated":
            prompt[5:5] = INVOCATION
        if size > VOCAB:
            prompt[2:2] = [VOCAB, size - 1]
        path = adapters[name] if name else None
        asked.append(Asked(name, prompt, *_answer(oracle, path, prompt, size)))
    dice.shuffle(asked)
    return Case(model, adapters, asked)


def _answer(
    oracle: VocabularyOracle, path: Path | None, prompt: Sequence[int], size: int
) -> tuple[list[int], torch.Tensor]:
    """PEFT's greedy tokens by its own `generate`, and their log-probabilities [COUNT, V]."""
    model = oracle.model(path, size)
    if not isinstance(model, PeftModel):
        ids = oracle.greedy(path, prompt, COUNT, size)
        every = oracle.logits(path, [*prompt, *ids][:-1], size)  # [T, V]
        return ids, every.log_softmax(-1)[len(prompt) - 1 :]
    ids = torch.tensor([list(prompt)])
    settings = {"max_new_tokens": COUNT, "min_new_tokens": COUNT, "do_sample": False}
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
    tokens = out.sequences[0, len(prompt) :].tolist()
    return tokens, torch.cat(out.logits).log_softmax(-1)


def _served_as_peft(case: Case, some: Sequence[set[str]] = (), **settings: Any) -> LLM:
    """All in flight together, then those of each of `some` adapters."""
    with LLM(str(case.model), **SETTINGS | settings) as llm:
        for name, path in case.adapters.items():
            llm.engine.add_adapter(name, str(path))
        for _ in range(2):  # the second time from the prefix cache
            _answered_as_peft(llm, case.asked)
        for names in some:
            _answered_as_peft(llm, [one for one in case.asked if one.adapter in names])
    return llm


def _answered_as_peft(llm: LLM, asked: list[Asked]) -> None:
    requests = [(one.prompt, GREEDY, [one.adapter] if one.adapter else []) for one in asked]
    for one, got in zip(asked, answered_together(llm.engine, requests), strict=True):
        assert got.tokens == one.expected, one.adapter
        for entry, values in zip(got.logprobs, one.logprobs, strict=True):
            for item in (entry.chosen, *entry.top):
                assert item.logprob == pytest.approx(float(values[item.token_id]), abs=2e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_loras": 16},
        {"max_num_batched_tokens": 16, "max_num_seqs": 5, "block_size": 4},
    ],
    ids=["roomy", "chunked-evicting"],
)
def test_one_batch_equals_peft(case: Case, settings: dict[str, Any]) -> None:
    _served_as_peft(case, **settings)


def test_the_packed_steps_of_gpus_equal_peft(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "make_runner", GpuRunner)
    _served_as_peft(case, async_scheduling=True, max_num_batched_tokens=48)


def test_replayed_steps_equal_peft(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run their step once more here."""
    monkeypatch.setattr(engine, "make_runner", CpuReplayingRunner)
    settings = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "async_scheduling": True}
    settings |= {"cudagraph_capture_sizes": [4, 8, 24], "max_model_len": 128}
    some = [{"plain", "rslora"}, {"plain", "dora"}, {"dora", "tokens"}]
    llm = _served_as_peft(case, some, **settings)
    replayed = {event.key for event in llm.engine.runner.events if event.kind == "replay"}
    kinds = {(key.affine, key.outer) for key in replayed if key is not None and key.adapters}
    assert kinds == {(False, False), (True, False), (True, True)}


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("fully", [False, True], ids=["default", "fully"])
@pytest.mark.parametrize("packed", [False, True], ids=["cpu", "packed"])
def test_ranks_equal_peft(
    case: Case, monkeypatch: pytest.MonkeyPatch, packed: bool, fully: bool
) -> None:
    if packed:
        monkeypatch.setattr(engine, "make_runner", GpuRunner)
        monkeypatch.setattr(follower, "make_runner", GpuRunner)
    _served_as_peft(
        case, tensor_parallel_size=2, async_scheduling=packed, fully_sharded_loras=fully
    )
