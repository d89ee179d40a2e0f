"""Adapters that change the vocabulary against PEFT: LoRA on the embedding and the head, full copies,
trained tokens, added and cut vocabularies; all in one batch with base rows and plain adapters."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from gpu.replaying import CpuReplayingRunner
from loramux import LLM, PoolingParams, SamplingParams
from loramux.engine import engine, follower
from loramux.engine.gpu_runner import GpuRunner
from loramux.errors import InvalidField
from loramux.models import loader
from loramux.types import AdapterUse
from parity.heads import peft_logits, save_classifier
from parity.vocabularies import ADDED, VocabularyOracle, save_vocabulary
from ranks import thread_ranks  # noqa: F401
from tiny import VOCAB, save_adapter, save_model
from together import Answer, answered_together

COUNT = 4
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
    for name in [None, *adapters, None, "plain"]:
        size, path = _size(name), adapters[name] if name else None
        prompt = [dice.randrange(3, size) for _ in range(dice.randrange(4, 30))]
        if size > VOCAB:  # tokens that only this adapter knows
            prompt[2:2] = [VOCAB, size - 1]
        asked.append(Asked(name, size, prompt, oracle.greedy(path, prompt, COUNT, size)))
    dice.shuffle(asked)
    return Case(model, adapters, oracle, asked)


def _run(llm: LLM, asked: list[Asked]) -> list[Answer]:
    """What each of them got, in flight together."""
    requests = [(one.prompt, GREEDY, [one.adapter] if one.adapter else []) for one in asked]
    return answered_together(llm.engine, requests)


def _served_as_peft(case: Case, **settings: Any) -> None:
    with LLM(str(case.model), **SETTINGS | settings) as llm:
        case.use(llm)
        for _ in range(2):  # the second time from the prefix cache
            for one, got in zip(case.asked, _run(llm, case.asked), strict=True):
                assert got.tokens == one.expected, one.adapter
                _check_logprobs(case, one, got.logprobs)


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


def test_captured_bodies_equal_peft(case: Case, monkeypatch) -> None:
    """With graphs that run their step once more: on a GPU, tests/gpu/test_vocabularies_on_gpu.py."""
    monkeypatch.setattr(engine, "make_runner", CpuReplayingRunner)
    settings = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "async_scheduling": True}
    settings |= {"cudagraph_capture_sizes": [4, 8, 24], "max_model_len": 128}
    with LLM(str(case.model), **SETTINGS | settings) as llm:
        case.use(llm)
        answers = _run(llm, case.asked)
        assert [answer.tokens for answer in answers] == [one.expected for one in case.asked]
        events = [event for event in llm.engine.runner.events if event.kind == "replay"]
        outer = [event for event in events if event.key is not None and event.key.outer]
        assert len(outer) > 5


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize(
    ("packed", "fully"), [(False, False), (True, False), (True, True), (False, True)]
)
def test_ranks_equal_peft(case: Case, monkeypatch, packed: bool, fully: bool) -> None:
    if packed:
        monkeypatch.setattr(engine, "make_runner", GpuRunner)
        monkeypatch.setattr(follower, "make_runner", GpuRunner)
    _served_as_peft(
        case, tensor_parallel_size=2, async_scheduling=packed, fully_sharded_loras=fully
    )


def _sum_of(case: Case, adapters: list[tuple[str, float]], tokens: list[int]) -> torch.Tensor:
    """Logits [T, V] with scaled adapters merged into the base weights; rows replaced first."""
    model = copy.deepcopy(case.oracle.model(None))
    model.get_output_embeddings().weight = torch.nn.Parameter(
        model.get_output_embeddings().weight.detach().clone()
    )
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for name, _ in adapters:
            own = case.oracle.model(case.adapters[name])
            ids = FEATURES.get(name, {}).get("trainable_token_indices")
            if isinstance(ids, dict):
                embedding[ids["embed_tokens"]] = own.get_input_embeddings().weight[
                    ids["embed_tokens"]
                ]
                head[ids["lm_head"]] = own.get_output_embeddings().weight[ids["lm_head"]]
        for name, scale in adapters:
            own = case.oracle.model(case.adapters[name]).base_model.model
            for path, module in own.named_modules():
                if isinstance(module, LoraLayer):
                    delta = module.get_delta_weight("default")
                    model.get_submodule(path).weight += scale * delta
        ids = torch.tensor([tokens])
        return model(input_ids=ids).logits[0]


def test_sums_equal_the_merged_weights(case: Case) -> None:
    dice = random.Random()
    sums = [
        [("embedding-lora", 0.5), ("both-lora", -1.5)],
        [("tokens-of-both", 2.0), ("head-lora", 0.7), ("plain", 1.0)],
        [("plain", 0.5), ("tokens-of-both", 1.0), ("embedding-lora", 1.0)],
    ]
    prompts = [[4, 8, 7, *(dice.randrange(3, VOCAB) for _ in range(12))] for _ in sums]
    with LLM(str(case.model), **SETTINGS) as llm:
        case.use(llm)
        for number, (members, prompt) in enumerate(zip(sums, prompts, strict=True)):
            uses = [AdapterUse(name, scale) for name, scale in members]
            llm.engine.submit(str(number), prompt, GREEDY, uses)
        found: dict[int, list[Any]] = {}
        while llm.engine.has_requests:
            for delta in llm.engine.step():
                assert delta.error is None
                found.setdefault(int(delta.request_id), []).extend(delta.logprobs or ())
        llm.engine.check_integrity()
    for number, (members, prompt) in enumerate(zip(sums, prompts, strict=True)):
        tokens = [*prompt, *(entry.chosen.token_id for entry in found[number])]
        wanted = _sum_of(case, members, tokens[:-1]).log_softmax(-1)[len(prompt) - 1 :]
        for entry, values in zip(found[number], wanted, strict=True):
            assert entry.chosen.token_id == int(values.argmax())
            for item in entry.top:
                assert item.logprob == pytest.approx(float(values[item.token_id]), abs=2e-3)


def test_embeddings_of_prompts_equal_peft(case: Case) -> None:
    """What is pooled goes through the adapter's embedding, and not through its head."""
    names = ["embedding-lora", "added", "tokens", "head-copy", "tied-copy"]
    with LLM(str(case.model), **SETTINGS) as llm:
        case.use(llm)
        for name in names:
            size = _size(name)
            prompt = [5, 17, size - 1, 40, 300 % size, 9]
            uses = [AdapterUse(name)]
            llm.engine.submit(name, prompt, PoolingParams(normalize=False), uses)
            pooled = []
            while llm.engine.has_requests:
                pooled += [d.pooled for d in llm.engine.step() if d.pooled is not None]
            wanted = case.oracle.hidden(case.adapters[name], prompt, size)
            torch.testing.assert_close(
                torch.tensor(pooled[0].values.tolist()), wanted, atol=2e-4, rtol=1e-3
            )


@pytest.mark.parametrize(
    "settings",
    [
        {"trainable_token_indices": [5, 17, 300]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["tokens", "copy", "lora"],
)
def test_classifiers_with_an_embedding_of_their_own(
    case: Case, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Of task_type SEQ_CLS, beside their head."""
    folder = save_classifier(case.model, tmp_path / "x", 3, seed=4, **settings)
    weights = load_file(folder / "adapter_model.safetensors")
    for key, tensor in weights.items():
        if key.endswith("trainable_tokens_delta"):
            tensor.normal_()
        elif key.endswith("embed_tokens.weight"):
            tensor[[5, 17]] = torch.randn(2, tensor.shape[1])
    save_file(weights, folder / "adapter_model.safetensors")
    prompt = [5, 17, 30, 300, 8]
    wanted = peft_logits(case.model, [folder], 3, prompt)
    with LLM(str(case.model), **SETTINGS | {"max_lora_vocabulary_rows": VOCAB}) as llm:
        llm.engine.add_adapter("x", str(folder))
        logits = PoolingParams(task="classify", use_activation=False)
        llm.engine.submit("x", prompt, logits, [AdapterUse("x")])
        pooled = []
        while llm.engine.has_requests:
            pooled += [d.pooled for d in llm.engine.step() if d.pooled is not None]
    assert pooled[0].values.tolist() == pytest.approx(wanted.tolist(), abs=3e-4)


def test_an_added_token_is_generated_and_goes_on(case: Case, tmp_path: Path) -> None:
    """The head's row of one added token is made to win after every token: chosen from random draws,
    under penalties and a bias, until a bias forbids it; base rows beside it never get it."""
    folder = save_vocabulary(case.model, tmp_path / "sure", 3, resize=WIDE)
    weights = load_file(folder / "adapter_model.safetensors")
    prompt = [7, 9, VOCAB + 1, 30]
    hidden = case.oracle.hidden(folder, prompt, WIDE)  # [D]
    tied = case.oracle.model(None).config.tie_word_embeddings
    for key, tensor in weights.items():
        if key.endswith("lm_head.weight") or (tied and key.endswith("embed_tokens.weight")):
            tensor[VOCAB + 2] = 50 * hidden / hidden.norm()
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "adapter_model.safetensors")
    oracle = VocabularyOracle(case.model)
    wanted = oracle.greedy(folder, prompt, 6, WIDE)
    assert wanted[0] == VOCAB + 2
    ways = {
        "greedy": SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
        "stop": SamplingParams(temperature=0, max_tokens=6, stop_token_ids=(VOCAB + 2,)),
        "biased": SamplingParams(
            temperature=0, max_tokens=1, logit_bias=((VOCAB + 2, -500.0), (VOCAB, 400.0))
        ),
        "penalised": SamplingParams(
            temperature=0, max_tokens=6, ignore_eos=True, repetition_penalty=1.3
        ),
        "drawn": SamplingParams(temperature=0.3, seed=5, max_tokens=1, logprobs=20, top_k=50),
    }
    with LLM(str(case.model), **SETTINGS) as llm:
        llm.engine.add_adapter("sure", str(folder))
        for name, params in ways.items():
            llm.engine.submit(name, prompt, params, [AdapterUse("sure")])
        free = SamplingParams(temperature=50.0, seed=1, max_tokens=40, ignore_eos=True)
        llm.engine.submit("base", prompt[:2], free)
        tokens: dict[str, list[int]] = {}
        while llm.engine.has_requests:
            for delta in llm.engine.step():
                assert delta.error is None
                tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    assert tokens["greedy"] == wanted
    assert tokens["stop"][0] == tokens["drawn"][0] == VOCAB + 2 and len(tokens["stop"]) == 1
    assert tokens["biased"] == [VOCAB]
    assert tokens["penalised"][0] == VOCAB + 2
    assert max(tokens["base"]) < VOCAB and len(tokens["base"]) == 40


def test_a_replaced_version_answers_with_its_own_rows(case: Case) -> None:
    """Requests in flight finish on the old one; plain adapters take its place afterwards."""
    one = next(one for one in case.asked if one.adapter == "tokens")
    other = case.oracle.greedy(case.adapters["tokens-of-both"], one.prompt, COUNT)
    with LLM(str(case.model), **SETTINGS | {"max_loras": 2}) as llm:
        llm.engine.add_adapter("x", str(case.adapters["tokens"]))
        llm.engine.submit("old", one.prompt, GREEDY, [AdapterUse("x")])
        llm.engine.step()
        llm.engine.add_adapter("x", str(case.adapters["tokens-of-both"]), replace=True)
        llm.engine.add_adapter("plain", str(case.adapters["plain"]))
        llm.engine.submit("new", one.prompt, GREEDY, [AdapterUse("x")])
        llm.engine.submit("plain", one.prompt, GREEDY, [AdapterUse("plain")])
        found: dict[str, list[int]] = {}
        while llm.engine.has_requests:
            for delta in llm.engine.step():
                found.setdefault(delta.request_id, []).extend(delta.token_ids)
        plain = case.oracle.greedy(case.adapters["plain"], one.prompt, COUNT)
        assert found == {"old": one.expected, "new": other, "plain": plain}
        llm.engine.check_integrity()


def test_requests_outside_their_vocabulary_are_refused(case: Case) -> None:
    def refused(uses: list[str], prompt: list[int], **params: Any) -> str:
        adapters = [AdapterUse(name) for name in uses]
        with pytest.raises(InvalidField) as caught:
            llm.engine.submit("x", prompt, SamplingParams(max_tokens=2, **params), adapters)
        return str(caught.value)

    with LLM(str(case.model), **SETTINGS) as llm:
        case.use(llm)
        assert f"outside the vocabulary of {VOCAB}" in refused([], [5, VOCAB])
        assert f"outside the vocabulary of {VOCAB}" in refused(["plain"], [5, VOCAB])
        assert f"outside the vocabulary of {WIDE}" in refused(["added"], [5, WIDE])
        assert f"outside the vocabulary of {CUT}" in refused(["cut"], [5, CUT])
        assert "stop_token_ids" in refused(["cut"], [5], stop_token_ids=(CUT,))
        assert "logit_bias" in refused(["tokens"], [5], logit_bias=((VOCAB, 1.0),))
        both = refused(["added", "tokens"], [5])
        assert "'added', 'tokens'" in both and "one of a sum may" in both
        assert not llm.engine.has_requests
        llm.engine.check_integrity()
