"""The whole engine on a tiny model: versions, caches, mixing, failures. PEFT parity is elsewhere."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loramux import LLM, LoRARequest, SamplingParams
from loramux.engine.plan import AdapterLoad, Row, SampleSpec, StepPlan
from loramux.errors import (
    AdapterExists,
    AdapterLoadFailed,
    ConfigError,
    EngineError,
    EngineStopped,
    InvalidField,
    Overloaded,
    PromptTooLong,
    UnknownModel,
)
from loramux.types import AdapterUse, Delta
from tiny import TinyWorld

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = [5, 9, 44, 102, 33, 9, 9, 71]


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def llm(tiny_world: TinyWorld, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(
        str(tiny_world.model),
        enable_lora=True,
        device="cpu",
        max_loras=2,
        max_lora_rank=8,
        max_cpu_loras=2,
        adapter_patience_s=0.05,
        async_scheduling=request.param,
    ) as llm:
        yield llm
        llm.engine.check_integrity()


def _lora(world: TinyWorld, name: str, scale: float = 1.0) -> LoRARequest:
    return LoRARequest(name, 1, str(world.adapters[name]), scale=scale)


def _tokens(llm: LLM, lora: LoRARequest | None = None) -> list[int]:
    return llm.generate([PROMPT], GREEDY, lora_request=lora)[0].outputs[0].token_ids


def _drain(llm: LLM, until: int = 10_000) -> list[Delta]:
    deltas: list[Delta] = []
    for _ in range(until):
        if not llm.engine.has_requests:
            break
        new = llm.engine.step()
        deltas += new
        if not new:
            llm.engine.wait()
    return deltas


# --- mixing -----------------------------------------------------------------------------------


def _logits(llm: LLM, plan: StepPlan) -> torch.Tensor:
    runner = llm.engine.runner
    runner._fill_batch(plan)
    try:
        with torch.inference_mode():
            return runner._forward(plan.rows)
    finally:
        runner.attached.batch.clear()


def _plan(members: list[tuple[tuple[int, float], ...]], length: int) -> StepPlan:
    spec = SampleSpec(GREEDY, 0, 0)
    rows = [
        Row(i, tuple(range(7 + i, 7 + i + length)), 0, (2 * i, 2 * i + 1), m, spec)
        for i, m in enumerate(members)
    ]
    return StepPlan(tuple(rows))


@pytest.mark.parametrize("length", [1, 20])
def test_base_rows_are_bit_identical_whatever_shares_the_batch(
    llm: LLM, tiny_world: TinyWorld, length: int
) -> None:
    store, runner = llm.engine.store, llm.engine.runner
    assert store is not None
    for name, row in (("a", 0), ("b", 8)):
        ref = llm.engine.add_adapter(name, str(tiny_world.adapters[name]))
        runner.load(AdapterLoad(ref, row), store.fetch(ref).result())
    mixed = _plan([(), ((0, 1.0),), (), ((0, 0.5), (8, 1.0)), ((8, 1.0),)], length)
    alone = _plan([()] * 5, length)
    with_adapters, without = _logits(llm, mixed), _logits(llm, alone)
    for row in (0, 2):
        assert torch.equal(with_adapters[row], without[row])
    for row in (1, 3, 4):
        assert not torch.allclose(with_adapters[row], without[row], atol=1e-3)


def test_base_rows_do_not_read_the_last_slot_as_vllm_cpu_does(tiny_world: TinyWorld) -> None:
    """vLLM's CPU backend gives base rows the adapter of slot -1, the last one, when it is filled."""
    with LLM(str(tiny_world.model), enable_lora=True, device="cpu", max_loras=4) as llm:
        alone = _tokens(llm)
        loras = [None, *(_lora(tiny_world, name) for name in "abcd"), None]
        outputs = llm.generate([PROMPT] * 6, GREEDY, lora_request=loras)
        answers = [output.outputs[0].token_ids for output in outputs]
        assert answers[0] == answers[5] == alone
        assert len({tuple(answer) for answer in answers}) == 5


# --- identity and versions --------------------------------------------------------------------


def test_replaced_in_flight_each_answer_comes_from_one_version(
    llm: LLM, tiny_world: TinyWorld
) -> None:
    old, new = _tokens(llm, _lora(tiny_world, "a")), _tokens(llm, _lora(tiny_world, "b"))
    engine = llm.engine
    engine.add_adapter("x", str(tiny_world.adapters["a"]))
    engine.submit("before", PROMPT, GREEDY, [AdapterUse("x")])
    seen: list[Delta] = []
    while not seen:
        seen += engine.step() or (engine.wait() or [])
    engine.add_adapter("x", str(tiny_world.adapters["b"]), replace=True)
    engine.submit("after", PROMPT, GREEDY, [AdapterUse("x")])
    seen += _drain(llm)
    for request, expected in (("before", old), ("after", new)):
        assert [t for d in seen if d.request_id == request for t in d.token_ids] == expected
    engine.remove_adapter("x")


def test_same_bytes_under_another_name_are_one_version(llm: LLM, tiny_world: TinyWorld) -> None:
    first = llm.engine.add_adapter("one", str(tiny_world.adapters["a"]))
    second = llm.engine.add_adapter("two", str(tiny_world.adapters["a"]))
    assert first.digest == second.digest
    uses = [AdapterUse("one", 0.5), AdapterUse("two", 0.5)]
    llm.engine.submit("r", PROMPT, GREEDY, uses)
    halves = [t for d in _drain(llm) for t in d.token_ids]
    assert halves == _tokens(llm, _lora(tiny_world, "a"))


def test_unload_while_in_use_finishes_and_then_is_gone(llm: LLM, tiny_world: TinyWorld) -> None:
    expected = _tokens(llm, _lora(tiny_world, "a"))
    llm.engine.submit("r", PROMPT, GREEDY, [AdapterUse("a")])
    llm.engine.remove_adapter("a")
    with pytest.raises(UnknownModel):
        llm.engine.submit("s", PROMPT, GREEDY, [AdapterUse("a")])
    assert [t for d in _drain(llm) for t in d.token_ids] == expected
    llm.engine.step()
    store, pool = llm.engine.store, llm.engine.scheduler.adapters
    assert store is not None and pool is not None
    assert len(store.host) == 0 and pool.resident() == []


def test_two_loads_of_one_name_at_once(llm: LLM, tiny_world: TinyWorld) -> None:
    results: list[object] = []

    def load() -> None:
        try:
            results.append(llm.engine.add_adapter("x", str(tiny_world.adapters["a"])))
        except AdapterExists as error:
            results.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(result, AdapterExists) for result in results) == 3


# --- caches -----------------------------------------------------------------------------------


def test_many_adapters_through_small_caches(llm: LLM, tiny_world: TinyWorld) -> None:
    loras = [_lora(tiny_world, name) for name in "abcd"]
    alone = [_tokens(llm, lora) for lora in loras]
    outputs = llm.generate([PROMPT] * 8, GREEDY, lora_request=loras * 2)
    assert [o.outputs[0].token_ids for o in outputs] == alone * 2
    store, stats = llm.engine.store, llm.engine.stats()
    assert store is not None and len(store.host) == 2
    assert stats.host_evictions > 0 and stats.device_evictions > 0
    assert {s.ref.name for s in stats.adapters} == set("abcd")
    assert sum(s.on_host for s in stats.adapters) == 2


def test_files_that_changed_since_are_an_error_and_nothing_else_suffers(
    llm: LLM, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_world.adapters["a"], tmp_path / "x"))
    llm.engine.add_adapter("x", str(folder))
    shutil.copy(tiny_world.adapters["d"] / "adapter_model.safetensors", folder)
    for name in "bcd":  # push x out of both caches
        _tokens(llm, _lora(tiny_world, name))
    base = _tokens(llm)
    llm.engine.submit("x", PROMPT, GREEDY, [AdapterUse("x")])
    llm.engine.submit("base", PROMPT, GREEDY)
    deltas = _drain(llm)
    [failed] = [d for d in deltas if d.request_id == "x"]
    assert failed.finish_reason == "error" and isinstance(failed.error, AdapterLoadFailed)
    assert "changed" in str(failed.error)
    assert [t for d in deltas if d.request_id == "base" for t in d.token_ids] == base


def test_prefix_is_reused_within_one_version_only(llm: LLM, tiny_world: TinyWorld) -> None:
    prompt = list(range(5, 45))
    lora = _lora(tiny_world, "a")
    for lora_request, cached in [(None, 0), (None, 32), (lora, 0), (lora, 32)]:
        output = llm.generate([prompt], GREEDY, lora_request=lora_request)[0]
        assert output.num_cached_tokens == cached


def test_loading_does_not_stop_the_others(
    llm: LLM, tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = llm.engine.store
    assert store is not None
    gate, fetch = threading.Event(), store._fetch

    def slow(ref: object) -> object:
        assert gate.wait(30)
        return fetch(ref)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "_fetch", slow)
    llm.engine.add_adapter("a", str(tiny_world.adapters["a"]))
    llm.engine.submit("cold", PROMPT, GREEDY, [AdapterUse("a")])
    llm.engine.submit("warm", PROMPT, GREEDY)
    warm: list[Delta] = []
    while not any(d.finished for d in warm):
        warm += llm.engine.step()
    assert {d.request_id for d in warm} == {"warm"}
    gate.set()
    assert any(d.request_id == "cold" and d.finished for d in _drain(llm))


# --- requests ---------------------------------------------------------------------------------


def test_cancel_gives_everything_back(llm: LLM, tiny_world: TinyWorld) -> None:
    llm.engine.add_adapter("a", str(tiny_world.adapters["a"]))
    long = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, n=2)
    llm.engine.submit("r", PROMPT, long, [AdapterUse("a")])
    llm.engine.cancel("r")
    llm.engine.submit("s", PROMPT, long, [AdapterUse("a")])
    for _ in range(50):
        if llm.engine.step():
            break
        llm.engine.wait()
    llm.engine.cancel("s")
    llm.engine.cancel("never heard of")
    assert all(d.finish_reason is None for d in llm.engine.step())
    assert not llm.engine.has_requests


def test_a_failed_step_ends_its_requests_and_not_the_engine(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(plan: StepPlan) -> None:
        raise RuntimeError("the device says no")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "launch", broken)
        with pytest.raises(EngineError, match="the device says no"):
            _tokens(llm)
    assert len(_tokens(llm)) == 8


def test_stopping_answers_every_request(llm: LLM) -> None:
    llm.engine.submit("r", PROMPT, SamplingParams(max_tokens=100, n=3))
    llm.engine.step()
    llm.engine.stop()
    with pytest.raises(EngineStopped):
        llm.engine.submit("s", PROMPT, GREEDY)
    ended = llm.engine.fail_all(EngineStopped("bye"))
    assert sorted(d.index for d in ended if d.finish_reason == "error") == [0, 1, 2]


@pytest.mark.parametrize(
    ("prompt", "params", "uses", "error", "word"),
    [
        ([], GREEDY, [], InvalidField, "empty"),
        ([400], GREEDY, [], InvalidField, "vocabulary"),
        ([-1], GREEDY, [], InvalidField, "vocabulary"),
        ([5] * 256, GREEDY, [], PromptTooLong, "256 tokens"),
        ([5] * 250, GREEDY, [], InvalidField, "leaves 6"),
        (PROMPT, GREEDY, [AdapterUse("nobody")], UnknownModel, "nobody"),
        (PROMPT, SamplingParams(logit_bias={999: 1}), [], InvalidField, "logit_bias"),
        (PROMPT, SamplingParams(stop_token_ids=[999]), [], InvalidField, "stop_token_ids"),
    ],
)
def test_bad_requests(llm: LLM, prompt, params, uses, error, word) -> None:
    with pytest.raises(error, match=word):
        llm.engine.submit("r", prompt, params, uses)
    assert not llm.engine.has_requests


def test_more_adapters_than_places_in_one_request(llm: LLM, tiny_world: TinyWorld) -> None:
    for name in "abc":
        llm.engine.add_adapter(name, str(tiny_world.adapters[name]))
    with pytest.raises(InvalidField, match="max_loras"):
        llm.engine.submit("r", PROMPT, GREEDY, [AdapterUse(name) for name in "abc"])


def test_full_queue(tiny_world: TinyWorld) -> None:
    with LLM(str(tiny_world.model), device="cpu", max_queue_len=2, max_num_seqs=1) as llm:
        for i in range(3):
            llm.engine.submit(str(i), PROMPT, GREEDY)
        with pytest.raises(Overloaded):
            llm.engine.submit("3", PROMPT, GREEDY)
        _drain(llm)
        with pytest.raises(InvalidField, match="enable_lora"):
            llm.engine.submit("4", PROMPT, GREEDY, [AdapterUse("a")])
        llm.engine.check_integrity()


def test_settings_are_checked(tiny_world: TinyWorld) -> None:
    with pytest.raises(ConfigError, match="unknown settings: max_lora"):
        LLM(str(tiny_world.model), enable_lora=True, max_lora=3)
    with pytest.raises(ConfigError, match="enable_lora"):
        LLM(str(tiny_world.model), max_loras=3)
    with pytest.raises(ConfigError, match="does not exist"):
        LLM(str(tiny_world.model / "nothing"))
    with pytest.raises(ConfigError, match="match no linear module"):
        LLM(str(tiny_world.model), enable_lora=True, target_modules=["nope"], device="cpu")
