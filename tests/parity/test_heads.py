"""Classification heads and embeddings against PEFT: label counts mixed in one batch, with embeddings and
generations between them; chunks, caches, both runners, ranks, adapters that are replaced."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux import LLM, LoRARequest, PoolingParams, SamplingParams
from loramux.engine import engine, follower
from loramux.engine.gpu_runner import GpuRunner
from loramux.models import loader
from loramux.types import AdapterUse
from parity.heads import peft_hidden, peft_logits, save_base_classifier, save_classifier
from parity.oracle import Oracle
from ranks import thread_ranks  # noqa: F401
from tiny import VOCAB, save_adapter, save_model
from together import answered_together

LABELS = {"two": 2, "three": 3, "seven": 7, "one": 1}
COUNT = 5  # tokens of a generation
GREEDY = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
EMBED = PoolingParams(task="embed")
LOGITS = PoolingParams(task="classify", use_activation=False)
SETTINGS: dict[str, Any] = {
    "enable_lora": True,
    "device": "cpu",
    "max_loras": 4,
    "max_lora_rank": 8,
}

# What one batch asks for: adapters, and what is to be done with the prompt.
Ask = tuple[tuple[str, ...], SamplingParams | PoolingParams]
ASKED: list[Ask] = [
    (("two",), LOGITS),
    ((), EMBED),
    (("seven",), LOGITS),
    ((), GREEDY),
    (("three",), LOGITS),
    (("plain",), GREEDY),
    (("two",), EMBED),
    (("one",), LOGITS),
    (("three", "plain"), LOGITS),
    (("plain",), EMBED),
    (("seven",), LOGITS),
]


@dataclass(frozen=True)
class Case:
    """A tiny model, its adapters, a prompt for each of ASKED, and what PEFT says of it."""

    model: Path
    adapters: dict[str, Path]
    prompts: list[list[int]]
    expected: list[Any]

    def use(self, llm: LLM) -> None:
        for name, path in self.adapters.items():
            llm.engine.add_adapter(name, str(path))

    def request(self, name: str) -> LoRARequest:
        return LoRARequest(name, 1, str(self.adapters[name]))


def _prompt(dice: random.Random, most: int = 40) -> list[int]:
    return [dice.randrange(3, VOCAB) for _ in range(dice.randrange(4, most))]


def _expected(
    model: Path, adapters: dict[str, Path], names: Sequence[str], params: Any, prompt: list[int]
) -> Any:
    if params is GREEDY:
        paths = {name: adapters[name] for name in names}
        return Oracle(model, paths).greedy(prompt, dict.fromkeys(names, 1.0), COUNT)
    if params is EMBED:
        path = adapters[names[0]] if names else None
        hidden = peft_hidden(model, path, prompt, LABELS.get(names[0], 2) if names else 2)
        return hidden / hidden.norm()
    return peft_logits(model, [adapters[name] for name in names], LABELS[names[0]], prompt)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root, dice = tmp_path_factory.mktemp(request.param), random.Random()
    model = save_model(root / "model", request.param)
    adapters = {
        name: save_classifier(model, root / name, count, seed=10 + count, r=2 + count % 5)
        for name, count in LABELS.items()
    }
    adapters["plain"] = save_adapter(model, root / "plain", r=5)
    prompts = [_prompt(dice) for _ in ASKED]
    expected = [
        _expected(model, adapters, names, params, prompt)
        for (names, params), prompt in zip(ASKED, prompts, strict=True)
    ]
    return Case(model, adapters, prompts, expected)


def _answers(llm: LLM, case: Case) -> list[Any]:
    """What each of ASKED got, all of them in flight together: tokens, or values."""
    requests = [
        (prompt, params, names) for (names, params), prompt in zip(ASKED, case.prompts, strict=True)
    ]
    answers = answered_together(llm.engine, requests)
    return [
        answer.tokens if params is GREEDY else answer.pooled
        for answer, (_, params) in zip(answers, ASKED, strict=True)
    ]


def _check(answers: Sequence[Any], expected: Sequence[Any]) -> None:
    for (names, params), got, wanted in zip(ASKED, answers, expected, strict=True):
        if params is GREEDY:
            assert got == wanted
            continue
        values = torch.tensor(got.values.tolist())
        torch.testing.assert_close(values, wanted, atol=2e-4, rtol=1e-3)
        if params is LOGITS:
            assert got.labels == tuple(f"LABEL_{i}" for i in range(LABELS[names[0]]))


def _served_as_peft(case: Case, **settings: Any) -> None:
    with LLM(str(case.model), **SETTINGS | settings) as llm:
        case.use(llm)
        _check(_answers(llm, case), case.expected)
        _check(_answers(llm, case), case.expected)  # whatever the prefix cache has now


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 16, "max_num_seqs": 4, "block_size": 4},
        {"max_loras": 2, "adapter_patience_s": 0.02, "max_cpu_loras": 2},
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
    """On CPUs, where nothing is captured."""
    monkeypatch.setattr(engine, "make_runner", GpuRunner)
    _served_as_peft(case, async_scheduling=ahead, max_num_batched_tokens=48)


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("packed", [False, True])
def test_ranks_equal_peft(case: Case, monkeypatch, packed: bool) -> None:
    if packed:
        monkeypatch.setattr(engine, "make_runner", GpuRunner)
        monkeypatch.setattr(follower, "make_runner", GpuRunner)
    _served_as_peft(case, tensor_parallel_size=2, async_scheduling=packed)


def test_offline_shapes(case: Case) -> None:
    prompt = case.prompts[0]
    with LLM(str(case.model), **SETTINGS) as llm:
        outputs = llm.classify(
            [prompt] * 2, lora_request=[case.request("two"), case.request("one")]
        )
        for output, name in zip(outputs, ("two", "one"), strict=True):
            logits = peft_logits(case.model, [case.adapters[name]], LABELS[name], prompt)
            wanted = logits.softmax(-1) if LABELS[name] > 1 else logits.sigmoid()
            assert output.outputs.probs == pytest.approx(wanted.tolist(), abs=1e-4)
            assert output.outputs.num_classes == LABELS[name]
            assert output.outputs.label == f"LABEL_{int(wanted.argmax())}"
            assert (output.prompt_token_ids, output.finished) == (prompt, True)
        hidden = peft_hidden(case.model, None, prompt)
        raw, cut, usual = llm.embed(
            [prompt] * 3,
            pooling_params=[
                PoolingParams(normalize=False),
                PoolingParams(dimensions=7),
                PoolingParams(),
            ],
        )
        assert raw.outputs.embedding == pytest.approx(hidden.tolist(), rel=1e-3, abs=1e-4)
        short = hidden[:7] / hidden[:7].norm()
        assert cut.outputs.embedding == pytest.approx(short.tolist(), abs=1e-4)
        assert usual.outputs.embedding == pytest.approx((hidden / hidden.norm()).tolist(), abs=1e-4)
        assert usual.outputs.hidden_size == len(hidden)
        llm.engine.check_integrity()


def test_padding_at_the_end_is_left_out_as_transformers_does(case: Case) -> None:
    """Of a class; the embedding is of the last token, whatever it is."""
    prompt = [*case.prompts[0], 0, 0]
    with LLM(str(case.model), **SETTINGS) as llm:
        (output,) = llm.classify(
            [prompt], pooling_params=LOGITS, lora_request=case.request("seven")
        )
        wanted = peft_logits(case.model, [case.adapters["seven"]], 7, prompt)
        assert output.outputs.probs == pytest.approx(wanted.tolist(), abs=2e-4)
        (all_padding,) = llm.classify(
            [[0, 0, 0]], pooling_params=LOGITS, lora_request=case.request("seven")
        )
        wanted = peft_logits(case.model, [case.adapters["seven"]], 7, [0, 0, 0])
        assert all_padding.outputs.probs == pytest.approx(wanted.tolist(), abs=2e-4)
        (embedded,) = llm.embed([prompt], pooling_params=PoolingParams(normalize=False))
        hidden = peft_hidden(case.model, None, prompt)
        assert embedded.outputs.embedding == pytest.approx(hidden.tolist(), rel=1e-3, abs=1e-4)


def test_a_replaced_adapter_answers_with_its_own_head(case: Case, tmp_path: Path) -> None:
    """Requests in flight finish on the old version; new ones get the new head, of another width."""
    other = save_classifier(case.model, tmp_path / "other", 5, seed=99)
    prompt = case.prompts[1]
    with LLM(str(case.model), **SETTINGS) as llm:
        llm.engine.add_adapter("x", str(case.adapters["two"]))
        llm.engine.submit("old", prompt, LOGITS, [AdapterUse("x")])
        llm.engine.add_adapter("x", str(other), replace=True)
        llm.engine.submit("new", prompt, LOGITS, [AdapterUse("x")])
        found: dict[str, list[float]] = {}
        while llm.engine.has_requests:
            for delta in llm.engine.step():
                assert delta.pooled is not None
                found[delta.request_id] = delta.pooled.values.tolist()
        old = peft_logits(case.model, [case.adapters["two"]], 2, prompt)
        new = peft_logits(case.model, [other], 5, prompt)
        assert found["old"] == pytest.approx(old.tolist(), abs=2e-4)
        assert found["new"] == pytest.approx(new.tolist(), abs=2e-4)
        llm.engine.check_integrity()
        store = llm.engine.store
        assert store is not None and len(store._heads) == 1  # of the new version


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.usefixtures("thread_ranks")
def test_a_base_classifier_and_adapters_on_it(case: Case, tmp_path: Path, size: int) -> None:
    names = ["calm", "angry", "sad"]
    model = save_base_classifier(case.model, tmp_path / "base", names)
    same = save_classifier(model, tmp_path / "same", 3, seed=4)
    loras = [
        None,
        case.request("seven"),
        LoRARequest("plain", 2, str(case.adapters["plain"])),
        LoRARequest("same", 3, str(same)),
    ]
    prompt = case.prompts[0]
    wanted = [
        peft_logits(model, [], 3, prompt),
        peft_logits(case.model, [case.adapters["seven"]], 7, prompt),
        peft_logits(model, [case.adapters["plain"]], 3, prompt),  # its LoRA, the base model's head
        peft_logits(model, [same], 3, prompt),
    ]
    with LLM(str(model), **SETTINGS, tensor_parallel_size=size) as llm:
        outputs = llm.classify([prompt] * 4, pooling_params=LOGITS, lora_request=loras)
        for output, logits in zip(outputs, wanted, strict=True):
            assert output.outputs.probs == pytest.approx(logits.tolist(), abs=2e-4)
        assert outputs[0].outputs.labels == outputs[3].outputs.labels == tuple(names)
        assert outputs[1].outputs.labels == tuple(f"LABEL_{i}" for i in range(7))
        hidden = peft_hidden(model, None, prompt)
        (embedded,) = llm.embed([prompt], pooling_params=PoolingParams(normalize=False))
        assert embedded.outputs.embedding == pytest.approx(hidden.tolist(), rel=1e-3, abs=1e-4)
