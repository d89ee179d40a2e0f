"""Pooled requests in the engine: what is refused by name, and that each ends, whatever happens."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from loramux import LLM, LoRARequest, PoolingParams, SamplingParams
from loramux.config import EngineConfig
from loramux.engine.plan import StepPlan
from loramux.errors import ConfigError, InvalidField, LoramuxError, Overloaded, PromptTooLong
from loramux.models import loader
from loramux.models.loader import load_model
from loramux.types import AdapterUse, Delta
from parity.heads import save_base_classifier, save_classifier
from tiny import VOCAB, TinyWorld

CLASSIFY = PoolingParams(task="classify")
EMBED = PoolingParams()
PROMPT = [5, 9, 44, 102, 33, 9, 9, 71]
SETTINGS: dict[str, Any] = {
    "enable_lora": True,
    "device": "cpu",
    "max_lora_rank": 8,
    "max_loras": 2,
}


@pytest.fixture(scope="module")
def classifiers(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("classifiers")
    return {
        name: save_classifier(tiny_world.model, root / name, count, seed=count)
        for name, count in (("x", 3), ("y", 2))
    }


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def llm(
    tiny_world: TinyWorld, classifiers: dict[str, Path], request: pytest.FixtureRequest
) -> Iterator[LLM]:
    settings = SETTINGS | {"max_model_len": 48, "async_scheduling": request.param}
    with LLM(str(tiny_world.model), **settings) as llm:
        for name, path in {**classifiers, "a": tiny_world.adapters["a"]}.items():
            llm.engine.add_adapter(name, str(path))
        yield llm
        llm.engine.check_integrity()


def _drain(llm: LLM) -> dict[str, Delta]:
    """The last Delta of each request."""
    last: dict[str, Delta] = {}
    while llm.engine.has_requests:
        deltas = llm.engine.step()
        last |= {delta.request_id: delta for delta in deltas}
        if not deltas:
            llm.engine.wait()
    return last


REFUSALS: list[tuple[tuple[str, ...], Any, str]] = [
    ((), CLASSIFY, "the base model has no classification head"),
    (("a",), CLASSIFY, "adapter 'a' has no classification head"),
    (("x", "y"), CLASSIFY, "'x', 'y' have a classification head each"),
    (("x",), SamplingParams(), "adapter 'x' is a sequence classifier, which generates nothing"),
    (("a", "x"), SamplingParams(), "adapter 'x' is a sequence classifier"),
    ((), PoolingParams(dimensions=65), "dimensions is 65, and the model has 64"),
]


@pytest.mark.parametrize(("names", "params", "word"), REFUSALS, ids=[r[2][:30] for r in REFUSALS])
def test_refusals_count_no_user(llm: LLM, names: tuple[str, ...], params: Any, word: str) -> None:
    with pytest.raises(InvalidField, match=word):
        llm.engine.submit("r", PROMPT, params, [AdapterUse(name) for name in names])
    assert all(status.users == 0 for status in llm.engine.adapters())


def test_lengths(llm: LLM) -> None:
    """A prompt may fill the context, for no answer has to fit behind it."""
    with pytest.raises(PromptTooLong):
        llm.engine.submit("r", [7] * 49, EMBED)
    with pytest.raises(InvalidField, match="empty"):
        llm.engine.submit("r", [], EMBED)
    with pytest.raises(InvalidField, match="vocabulary"):
        llm.engine.submit("r", [VOCAB], EMBED)
    (output,) = llm.embed([[7] * 48])
    assert len(output.outputs.embedding) == 64


def test_params_name_what_is_wrong() -> None:
    for wrong in ({"task": "score"}, {"task": "classify", "dimensions": 3}, {"dimensions": 0}):
        with pytest.raises(InvalidField):
            PoolingParams(**wrong)  # type: ignore[arg-type]


def test_offline_params_are_of_the_task(llm: LLM) -> None:
    with pytest.raises(InvalidField, match="'classify'"):
        llm.classify([PROMPT], pooling_params=EMBED)
    with pytest.raises(InvalidField, match="pooling_params has 1 entries for 2 prompts"):
        llm.embed([PROMPT, PROMPT], pooling_params=[EMBED])


def test_the_queue_is_limited(tiny_world: TinyWorld) -> None:
    with LLM(str(tiny_world.model), device="cpu", max_num_seqs=1, max_queue_len=1) as llm:
        for number in range(2):
            llm.engine.submit(str(number), PROMPT, EMBED)
        with pytest.raises(Overloaded):
            llm.engine.submit("2", PROMPT, EMBED)
        assert set(_drain(llm)) == {"0", "1"}


def test_what_is_cancelled_says_nothing(llm: LLM) -> None:
    """Before a step, and between its launch and its result."""
    for name in ("early", "late", "stays"):
        llm.engine.submit(name, PROMPT, EMBED)
    llm.engine.cancel("early")
    first = llm.engine.step()
    llm.engine.cancel("late")
    found = {delta.request_id for delta in first} | set(_drain(llm))
    assert found - {"late"} == {"stays"}
    assert ("late" in found) == (not llm.engine.runner.run_ahead)


def test_a_failing_step_ends_its_requests_with_an_error(llm: LLM, monkeypatch) -> None:
    launch = llm.engine.runner.launch

    def fail(plan: StepPlan) -> Any:
        monkeypatch.setattr(llm.engine.runner, "launch", launch)
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(llm.engine.runner, "launch", fail)
    llm.engine.submit("bad", PROMPT, CLASSIFY, [AdapterUse("x")])
    last = _drain(llm)
    assert last["bad"].finish_reason == "error" and "no such kernel" in str(last["bad"].error)
    (output,) = llm.classify([PROMPT], lora_request=LoRARequest("x"))
    assert output.outputs.num_classes == 3


def test_a_head_that_went_away_is_an_error(llm: LLM, monkeypatch) -> None:
    monkeypatch.setattr(llm.engine.store, "head", lambda digest: None)
    llm.engine.submit("r", PROMPT, CLASSIFY, [AdapterUse("x")])
    assert isinstance(_drain(llm)["r"].error, LoramuxError)


def test_prefix_cache_serves_pooled_and_generated_alike(llm: LLM) -> None:
    prompt = [random.randrange(3, VOCAB) for _ in range(40)]
    (fresh,) = llm.embed([prompt])
    assert fresh.num_cached_tokens == 0
    (again,) = llm.embed([prompt])
    assert again.num_cached_tokens == 32
    assert again.outputs.embedding == pytest.approx(fresh.outputs.embedding, abs=1e-5)
    (text,) = llm.generate([prompt], SamplingParams(max_tokens=2))
    assert text.num_cached_tokens == 32
    (other,) = llm.embed([prompt], lora_request=LoRARequest("x"))
    assert other.num_cached_tokens == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_few_blocks_preempt_and_every_request_ends(
    tiny_world: TinyWorld, classifiers: dict[str, Path], ahead: bool
) -> None:
    """Pooled and generated ones push each other out of a small cache; values stay what they are."""
    config = EngineConfig(model=str(tiny_world.model), device="cpu")
    per_token = load_model(config).facts.kv_bytes_per_token
    dice = random.Random()
    prompts = [[dice.randrange(3, VOCAB) for _ in range(dice.randrange(9, 60))] for _ in range(24)]
    with LLM(str(tiny_world.model), **SETTINGS) as llm:
        wanted = [output.outputs.embedding for output in llm.embed(prompts)]
    small = {
        "kv_cache_memory_bytes": 160 * per_token,
        "max_model_len": 96,
        "block_size": 4,
        "max_num_batched_tokens": 24,
        "async_scheduling": ahead,
    }
    with LLM(str(tiny_world.model), **SETTINGS, **small) as llm:
        llm.engine.add_adapter("x", str(classifiers["x"]))
        generate = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
        for number, prompt in enumerate(prompts):
            llm.engine.submit(f"embed-{number}", prompt, EMBED)
            llm.engine.submit(f"text-{number}", prompt[:20], generate)
            llm.engine.submit(f"class-{number}", prompt, CLASSIFY, [AdapterUse("x")])
        last = _drain(llm)
        assert len(last) == 3 * len(prompts)
        assert all(delta.error is None and delta.finished for delta in last.values())
        for number, vector in enumerate(wanted):
            pooled = last[f"embed-{number}"].pooled
            assert pooled is not None
            assert pooled.values.tolist() == pytest.approx(vector, abs=1e-4)
        assert llm.engine.stats().preemptions > 0
        llm.engine.check_integrity()


# --- models ----------------------------------------------------------------------------------------


def test_a_classifier_generates_nothing(tiny_world: TinyWorld, tmp_path: Path) -> None:
    model = save_base_classifier(
        *(tiny_world.model, tmp_path / "model", ["a", "b"]),
        problem_type="multi_label_classification",
    )
    with LLM(str(model), device="cpu") as llm:
        with pytest.raises(InvalidField, match="this model is a sequence classifier"):
            llm.generate([PROMPT])
        raw = PoolingParams(task="classify", use_activation=False)
        logits, probabilities = llm.classify([PROMPT] * 2, pooling_params=[raw, CLASSIFY])
        wanted = torch.tensor(logits.outputs.probs).sigmoid()  # of several labels
        assert probabilities.outputs.probs == pytest.approx(wanted.tolist(), abs=1e-5)
    with LLM(str(model), device="cpu", load_format="dummy") as llm:
        assert llm.classify([PROMPT])[0].outputs.labels == ("a", "b")


def test_a_classifier_without_its_head_is_refused(tiny_world: TinyWorld, tmp_path: Path) -> None:
    model = save_base_classifier(tiny_world.model, tmp_path / "model", ["a", "b"])
    config = json.loads((model / "config.json").read_text())
    names = {str(i): f"n{i}" for i in range(5)}
    (model / "config.json").write_text(json.dumps(config | {"id2label": names}))
    with pytest.raises(ConfigError, match="its weight has shape"):
        LLM(str(model), device="cpu")
    (model / "config.json").write_text(json.dumps(config))
    weights = "model.safetensors"
    (model / weights).write_bytes((tiny_world.model / weights).read_bytes())
    with pytest.raises(ConfigError, match="has none of score"):
        LLM(str(model), device="cpu")


def test_a_model_without_hidden_states_says_so(
    tiny_world: TinyWorld, classifiers: dict[str, Path], monkeypatch
) -> None:
    """Its own forward calls no body: nothing pooled is taken in that would fail in a step."""
    monkeypatch.setattr(loader, "fuse", lambda attached, positions, extra: None)
    monkeypatch.setattr(LlamaForCausalLM, "base_model", property(lambda model: model))
    monkeypatch.setattr(LlamaForCausalLM, "get_decoder", lambda model: model)
    with LLM(str(tiny_world.model), **SETTINGS) as llm:
        llm.engine.add_adapter("x", str(classifiers["x"]))
        for names, params in (((), EMBED), (("x",), CLASSIFY)):
            with pytest.raises(InvalidField, match="hidden states cannot be had"):
                llm.engine.submit("r", PROMPT, params, [AdapterUse(name) for name in names])
        assert llm.generate([PROMPT])
        llm.engine.check_integrity()


POOLING = "1_Pooling"
LAST = {"word_embedding_dimension": 64, "pooling_mode_lasttoken": True}
SENTENCE_MODELS: list[tuple[list[str], dict[str, Any], str | None]] = [
    (["Transformer", "Pooling", "Normalize"], LAST, None),
    (["Transformer", "Pooling"], {"pooling_mode": "lasttoken"}, None),
    (["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True}, "it pools by mean"),
    (["Transformer", "Pooling"], LAST | {"pooling_mode_cls_token": True}, "lasttoken and cls"),
    (["Transformer", "Pooling", "Dense"], LAST, "its module Dense"),
    (["Transformer", "Pooling"], {}, "nothing known"),
]


@pytest.mark.parametrize(("modules", "settings", "word"), SENTENCE_MODELS, ids=str)
def test_embeddings_that_another_pooling_makes_are_refused(
    tiny_world: TinyWorld, tmp_path: Path, modules: list[str], settings: Any, word: str | None
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_world.model.iterdir():
        (model / file.name).symlink_to(file)
    listed = [
        {"idx": i, "name": str(i), "path": POOLING, "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(modules)
    ]
    (model / "modules.json").write_text(json.dumps(listed))
    (model / POOLING).mkdir()
    (model / POOLING / "config.json").write_text(json.dumps(settings))
    with LLM(str(model), device="cpu") as llm:
        if word is None:
            assert llm.embed([PROMPT])
        else:
            with pytest.raises(InvalidField, match=word):
                llm.embed([PROMPT])
        assert llm.generate([PROMPT], SamplingParams(max_tokens=1))
