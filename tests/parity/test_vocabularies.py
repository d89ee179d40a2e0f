"""Adapters that change the vocabulary against PEFT: LoRA on the embedding and the head, full copies,
trained tokens, added and cut vocabularies; all in one batch with base rows and plain adapters."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux import LLM, PoolingParams, SamplingParams
from loramux.engine import engine, follower
from loramux.engine.gpu_runner import GpuRunner
from loramux.errors import InvalidField, LoramuxError
from loramux.models import loader
from loramux.types import AdapterUse
from parity.vocabularies import ADDED, VocabularyOracle, save_vocabulary
from ranks import thread_ranks  # noqa: F401
from tiny import VOCAB, save_adapter, save_model

COUNT = 5
GREEDY = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=3)
WIDE = VOCAB + ADDED
CUT = VOCAB - 20
LORA_TARGETS = ["q_proj", "embed_tokens", "lm_head"]
FEATURES: dict[str, dict[str, Any]] = {
    "embedding-lora": {"target_modules": ["q_proj", "embed_tokens"]},
    "head-lora": {"target_modules": ["v_proj", "lm_head"]},
    "both-lora": {"target_modules": LORA_TARGETS, "use_rslora": True},
    "only-embedding": {"target_modules": ["embed_tokens"]},
    "tied-lora": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "embedding-copy": {"modules_to_save": ["embed_tokens"]},
    "head-copy": {"modules_to_save": ["lm_head"]},
    "copies": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tied-copy": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [5, 17, 300]},
    "tokens-by-name": {"trainable_token_indices": {"embed_tokens": [3, 9]}},
    "tokens-of-both": {"trainable_token_indices": {"embed_tokens": [8, 4], "lm_head": [7, 4]}},
    "tokens-alike": {"trainable_token_indices": {"embed_tokens": [8, 4], "lm_head": [8, 4]}},
    "tokens-of-head": {"trainable_token_indices": {"lm_head": [7, 4, 99]}},
    "added": {"resize": WIDE},
    "added-tokens": {"resize": WIDE, "trainable_token_indices": [4, VOCAB, VOCAB + 1]},
    "added-copies": {"resize": WIDE, "modules_to_save": ["embed_tokens", "lm_head"]},
    "added-copy": {"resize": WIDE, "modules_to_save": ["embed_tokens"]},
    "added-lora": {"resize": WIDE, "target_modules": LORA_TARGETS},
    "cut": {"resize": CUT},
    "cut-lora": {"resize": CUT, "target_modules": LORA_TARGETS},
}
SETTINGS: dict[str, Any] = {
    "enable_lora": True,
    "device": "cpu",
    "max_loras": 4,
    "max_lora_rank": 8,
    "max_lora_vocabulary_rows": 16,
    "enable_vocabulary_lora": True,
}


@dataclass(frozen=True)
class Asked:
    """One prompt of the batch: its adapter, the size of its vocabulary, and PEFT's answer."""

    adapter: str | None
    size: int
    prompt: list[int]
    expected: list[int]


@dataclass(frozen=True)
class Case:
    """A tiny model, an adapter for each feature, and two prompts for each and for those without."""

    model: Path
    adapters: dict[str, Path]
    oracle: VocabularyOracle
    asked: list[Asked]

    def use(self, llm: LLM) -> None:
        for name, path in self.adapters.items():
            llm.engine.add_adapter(name, str(path))


def _size(name: str | None) -> int:
    return FEATURES.get(name or "", {}).get("resize", VOCAB)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root, dice = tmp_path_factory.mktemp(request.param), random.Random()
    model = save_model(root / "model", request.param)
    adapters = {
        name: save_vocabulary(model, root / name, seed, **settings)
        for seed, (name, settings) in enumerate(FEATURES.items())
    }
    adapters["plain"] = save_adapter(model, root / "plain", r=5)
    oracle = VocabularyOracle(model)
    asked = []
    for name in [None, *adapters, None, *adapters]:
        size, path = _size(name), adapters[name] if name else None
        prompt = [dice.randrange(3, size) for _ in range(dice.randrange(4, 30))]
        if size > VOCAB:  # tokens that only this adapter knows
            prompt[2:2] = [VOCAB, size - 1]
        asked.append(Asked(name, size, prompt, oracle.greedy(path, prompt, COUNT, size)))
    dice.shuffle(asked)
    return Case(model, adapters, oracle, asked)


def _run(llm: LLM, asked: list[Asked]) -> tuple[list[list[int]], list[list[Any]]]:
    """Tokens and log-probabilities of all of them, in flight together."""
    tokens: list[list[int]] = [[] for _ in asked]
    logprobs: list[list[Any]] = [[] for _ in asked]
    for number, one in enumerate(asked):
        uses = [AdapterUse(one.adapter)] if one.adapter else []
        llm.engine.submit(str(number), one.prompt, GREEDY, uses)
    while llm.engine.has_requests:
        deltas = llm.engine.step()
        if not deltas:
            llm.engine.wait()
        for delta in deltas:
            assert delta.error is None
            tokens[int(delta.request_id)] += delta.token_ids
            logprobs[int(delta.request_id)] += delta.logprobs or ()
    llm.engine.check_integrity()
    return tokens, logprobs


def _served_as_peft(case: Case, **settings: Any) -> None:
    with LLM(str(case.model), **SETTINGS | settings) as llm:
        case.use(llm)
        for _ in range(2):  # the second time from the prefix cache
            tokens, logprobs = _run(llm, case.asked)
            for one, got, entries in zip(case.asked, tokens, logprobs, strict=True):
                assert got == one.expected, one.adapter
                _check_logprobs(case, one, entries)


def _check_logprobs(case: Case, one: Asked, entries: list[Any]) -> None:
    path = case.adapters[one.adapter] if one.adapter else None
    every = [*one.prompt, *one.expected]
    wanted = case.oracle.logits(path, every[:-1], one.size).log_softmax(-1)  # [T, V]
    for entry, values in zip(entries, wanted[len(one.prompt) - 1 :], strict=True):
        for item in (entry.chosen, *entry.top):
            assert item.logprob == pytest.approx(float(values[item.token_id]), abs=2e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 16, "max_num_seqs": 4, "block_size": 4},
        {"max_loras": 1, "adapter_patience_s": 0.01, "max_cpu_loras": 2},
        {"async_scheduling": True, "max_num_batched_tokens": 32},
    ],
    ids=["roomy", "no-prefix-cache", "chunked", "evicting", "ahead"],
)
def test_a_mixed_batch_equals_peft(case: Case, settings: dict[str, Any]) -> None:
    _served_as_peft(case, **settings)


def test_a_model_that_keeps_its_own_forward_equals_peft(case: Case, monkeypatch) -> None:
    monkeypatch.setattr(loader, "fuse", lambda attached, positions, extra: None)
    _served_as_peft(case)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_packed_steps_of_gpus_equal_peft(case: Case, monkeypatch, ahead: bool) -> None:
    monkeypatch.setattr(engine, "make_runner", GpuRunner)
    _served_as_peft(case, async_scheduling=ahead, max_num_batched_tokens=48)
