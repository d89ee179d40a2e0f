"""Planning a step while one runs changes when things happen, and no answer."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from loramux import LLM, SamplingParams
from loramux.adapters.weights import AdapterWeights
from loramux.config import EngineConfig
from loramux.engine.adapter_parts import make_loads
from loramux.engine.engine import MAX_FAILED_STEPS
from loramux.engine.loads import MAX_PREFETCHES, AdapterLoads
from loramux.engine.plan import PENDING, AdapterLoad, StepPlan, StepResult
from loramux.engine.runner import Runner
from loramux.errors import EngineError, EngineStopped
from loramux.types import AdapterRef, AdapterUse, Delta
from tiny import TinyWorld

PROMPT = [5, 9, 44, 102, 33, 9, 9, 71]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


class LateDevice:
    """A runner whose steps run as late as they may, in the order of their launch, like a stream.

    A load waits for every step launched before it, as the runner for GPUs lets it.
    """

    def __init__(self, runner: Runner):
        self.runner = runner
        self.num_blocks = runner.num_blocks
        self.run_ahead = True
        self.pending_rows = 0
        self.most_in_flight = 0
        self._queue: list[tuple[StepPlan, Future[StepResult]]] = []
        self._lock = threading.Lock()

    def close(self) -> None:
        self.runner.close()

    def launch(self, plan: StepPlan) -> SimpleNamespace:
        self.pending_rows += sum(row.token_ids[-1] == PENDING for row in plan.rows)
        result: Future[StepResult] = Future()
        with self._lock:
            self._queue.append((plan, result))
            self.most_in_flight = max(self.most_in_flight, len(self._queue))
        return SimpleNamespace(read=lambda: self._read(result))

    def load(self, load: AdapterLoad, weights: AdapterWeights) -> None:
        with self._lock:
            self._run_until(None)
            self.runner.load(load, weights)

    def _read(self, result: Future[StepResult]) -> StepResult:
        with self._lock:
            self._run_until(result)
        return result.result()

    def _run_until(self, wanted: Future[StepResult] | None) -> None:
        while self._queue and not (wanted is not None and wanted.done()):
            plan, result = self._queue.pop(0)
            result.set_result(self.runner.execute(plan))


@dataclass
class _Said:
    """Everything a client hears of one answer."""

    tokens: tuple[int, ...] = ()
    text: str = ""
    reason: tuple[object, ...] = ()
    logprobs: tuple[Any, ...] = ()

    def add(self, delta: Delta) -> None:
        assert not self.reason, "news of an answer that had ended"
        self.tokens += delta.token_ids
        self.text += delta.text
        self.logprobs += delta.logprobs or ()
        if delta.finished:
            self.reason = (delta.finish_reason, delta.stop_reason)


def _llm(world: TinyWorld, **settings: Any) -> LLM:
    return LLM(
        str(world.model),
        enable_lora=True,
        device="cpu",
        **{
            "max_loras": 2,
            "max_lora_rank": 8,
            "max_cpu_loras": 2,
            "adapter_patience_s": 0.05,
            "max_model_len": 64,
            **settings,
        },
    )


@pytest.fixture
def ahead(tiny_world: TinyWorld) -> Iterator[LLM]:
    with _llm(tiny_world, async_scheduling=True) as llm:
        yield llm
        llm.engine.check_integrity()


def _requests(rng: random.Random) -> list[tuple[list[int], SamplingParams, list[AdapterUse]]]:
    """A mix in which every answer is fixed by its request alone."""
    requests = []
    for _ in range(60):
        prompt = [rng.randint(3, 300) for _ in range(rng.randint(1, 30))]
        if rng.random() < 0.3:
            prompt = [7, 8, 9, 10] * 5 + prompt[:5]  # a prefix that others have too
        greedy = rng.random() < 0.5
        params = SamplingParams(
            n=rng.choice([1, 1, 2, 3]),
            temperature=0.0 if greedy else 0.8,
            top_p=rng.choice([1.0, 0.9]),
            seed=rng.randint(0, 1000),
            max_tokens=rng.choice([1, 2, 3, 10, 20, 30]),
            min_tokens=rng.choice([0, 1]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.0, 0.7]),
            logprobs=rng.choice([None, None, 2]),
            ignore_eos=rng.random() < 0.3,
            stop=rng.choice([[], [], ["a", "q", "Z", "1"], ["ab", "!!"]]),
            stop_token_ids=rng.choice([[], [], list(range(20, 50))]),
        )
        names = rng.sample("abcd", rng.choice([0, 1, 1, 2]))
        uses = [AdapterUse(name, rng.choice([0.5, 1.0])) for name in names]
        requests.append((prompt, params, uses))
    return requests


def _serve(llm: LLM, world: TinyWorld) -> dict[tuple[str, int], _Said]:
    """The mix, arriving a few at a time; some clients leave, and one adapter is replaced twice."""
    engine, rng = llm.engine, random.Random(1)
    for name, path in world.adapters.items():
        engine.add_adapter(name, str(path))
    said: dict[tuple[str, int], _Said] = {}
    waiting = list(enumerate(_requests(random.Random(0))))
    while waiting or engine.has_requests:
        for _ in range(min(len(waiting), rng.choice([0, 1, 3]))):
            number, (prompt, params, uses) = waiting.pop(0)
            engine.submit(str(number), prompt, params, uses)
            if number in (20, 40):
                engine.add_adapter("a", str(world.adapters["bd"[number // 40]]), replace=True)
            if number % 10 == 9:
                engine.cancel(str(number - rng.randint(0, 3)))
        deltas = engine.step()
        for delta in deltas:
            said.setdefault((delta.request_id, delta.index), _Said()).add(delta)
        if not deltas and engine.has_requests:
            engine.wait()
    engine.check_integrity()
    return said


def _same_where_both_ended(
    left: dict[tuple[str, int], _Said], right: dict[tuple[str, int], _Said]
) -> int:
    """Compare; a client that left has heard a beginning. Returns how many ended in both."""
    count = 0
    for key in left.keys() | right.keys():
        mine, other = left.get(key, _Said()), right.get(key, _Said())
        short = min(len(mine.tokens), len(other.tokens))
        assert mine.tokens[:short] == other.tokens[:short], key
        if mine.reason and other.reason:
            count += 1
            assert (mine.tokens, mine.text, mine.reason) == (other.tokens, other.text, other.reason)
            for a, b in zip(mine.logprobs, other.logprobs, strict=True):
                assert a.chosen.token_id == b.chosen.token_id
                assert a.chosen.logprob == pytest.approx(b.chosen.logprob, abs=1e-3)
                assert [t.token_id for t in a.top] == [t.token_id for t in b.top]
    return count


@pytest.mark.parametrize("late", [False, True])
def test_answers_are_those_of_one_step_after_the_other(tiny_world: TinyWorld, late: bool) -> None:
    small = {"kv_cache_memory_bytes": 200_000, "max_num_seqs": 12, "max_num_batched_tokens": 48}
    with _llm(tiny_world, async_scheduling=False, **small) as llm:
        expected = _serve(llm, tiny_world)
        assert llm.engine.stats().preemptions > 0 and llm.engine.stats().device_evictions > 0
    with _llm(tiny_world, async_scheduling=True, **small) as llm:
        if late:
            device = LateDevice(llm.engine.runner)
            llm.engine.runner = device  # type: ignore[assignment]
            store, inbox = llm.engine.store, llm.engine.inbox
            llm.engine.loads = make_loads(store, llm.engine.runner, inbox, llm.engine._arrived)
        got = _serve(llm, tiny_world)
        stats = llm.engine.stats()
        assert stats.preemptions > 0 and stats.device_evictions > 0
        if late:
            assert device.pending_rows > 100 and device.most_in_flight == 2
    assert {reason for said in got.values() for reason, *_ in [said.reason or (None,)]} >= {
        "stop",
        "length",
    }
    assert _same_where_both_ended(expected, got) > 60


def test_results_come_one_call_later(ahead: LLM) -> None:
    engine = ahead.engine
    engine.submit("r", PROMPT, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    news = [[len(d.token_ids) for d in engine.step()] for _ in range(3)]
    assert news == [[], [1], [1]]
    assert not engine.has_requests


def test_a_step_in_flight_is_work_until_it_is_read(ahead: LLM) -> None:
    engine = ahead.engine
    first = ahead.generate([PROMPT], GREEDY)[0].outputs[0].token_ids[0]
    stopping = SamplingParams(temperature=0, max_tokens=8, stop_token_ids=[first])
    engine.submit("r", PROMPT, stopping)
    engine.step()
    assert [d.finish_reason for d in engine.step()] == ["stop"]
    assert engine.has_requests, "the step after the last token is still in flight"
    engine.wait()  # must not sleep: there is something to read
    assert engine.step() == [] and not engine.has_requests


def test_cancelled_with_a_step_in_flight(ahead: LLM) -> None:
    engine = ahead.engine
    engine.submit("r", PROMPT, SamplingParams(max_tokens=50, n=2, ignore_eos=True))
    for _ in range(3):
        engine.step()
    engine.cancel("r")
    assert engine.step() == [] and not engine.has_requests
    engine.check_integrity()


def test_stopping_with_a_step_in_flight(ahead: LLM) -> None:
    engine = ahead.engine
    engine.submit("r", PROMPT, SamplingParams(max_tokens=50, n=2, ignore_eos=True))
    engine.step()
    ended = engine.fail_all(EngineStopped("bye"))
    assert [d.finish_reason for d in ended] == ["error", "error"]
    assert not engine.has_requests


def _fail(
    monkeypatch: pytest.MonkeyPatch, engine: Any, *, at: set[int], reading: bool
) -> Callable[[], int]:
    """Let the launches numbered `at` fail, or the reading of what they launched."""
    launch, count = engine.runner.launch, 0

    def no() -> StepResult:
        raise RuntimeError("the device says no")

    def flaky(plan: StepPlan) -> Any:
        nonlocal count
        count += 1
        if count not in at:
            return launch(plan)
        if not reading:
            no()
        launch(plan)
        return SimpleNamespace(read=no)

    monkeypatch.setattr(engine.runner, "launch", flaky)
    return lambda: count


@pytest.mark.parametrize("reading", [False, True])
def test_a_failed_step_takes_those_with_it_that_used_its_tokens(
    ahead: LLM, monkeypatch: pytest.MonkeyPatch, reading: bool
) -> None:
    engine = ahead.engine
    whole = ahead.generate([PROMPT], GREEDY)[0].outputs[0].token_ids
    launches = _fail(monkeypatch, engine, at={3}, reading=reading)
    engine.submit("hit", PROMPT, GREEDY)
    ends, tokens, later = {}, [], False
    while engine.has_requests or not later:
        # One that comes with step 4, launched before the reading of step 3 fails.
        if launches() == 3 and not later:
            engine.submit("later", PROMPT, GREEDY)
            later = True
        for delta in engine.step():
            tokens += delta.token_ids if delta.request_id == "hit" else ()
            if delta.finished:
                ends[delta.request_id] = delta.finish_reason
    assert ends == {"hit": "error", "later": "error" if reading else "length"}
    assert tokens == whole[: len(tokens)] and len(tokens) == (2 if reading else 1)
    engine.check_integrity()
    assert ahead.generate([PROMPT], GREEDY)[0].outputs[0].token_ids == whole


def test_a_device_that_always_fails_is_lost(ahead: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ahead.engine
    _fail(monkeypatch, engine, at=set(range(100)), reading=True)
    failed = 0
    with pytest.raises(EngineError, match="the device says no"):
        for i in range(20):
            engine.submit(str(i), PROMPT, GREEDY)
            failed += sum(d.finish_reason == "error" for d in engine.step())
    assert failed >= MAX_FAILED_STEPS - 1
    engine.fail_all(EngineError("lost"))
    assert not engine.has_requests


def test_the_setting(tiny_world: TinyWorld, ahead: LLM) -> None:
    assert ahead.engine.runner.run_ahead and ahead.config.async_scheduling is True
    assert EngineConfig(model="m").async_scheduling is None
    with _llm(tiny_world) as llm:
        assert not llm.engine.runner.run_ahead and llm.config.async_scheduling is False


# --- reading adapters ahead of time -----------------------------------------------------------


def test_an_adapter_is_read_when_its_request_arrives(ahead: LLM, tiny_world: TinyWorld) -> None:
    engine, store = ahead.engine, ahead.engine.store
    assert store is not None
    for name in "abcd":  # host memory keeps c and d
        engine.add_adapter(name, str(tiny_world.adapters[name]))
    ref = store.registry.current("a")
    assert ref is not None and ref.digest not in store.host
    both = [AdapterUse("c"), AdapterUse("d")]
    engine.submit("busy", PROMPT, SamplingParams(max_tokens=50, ignore_eos=True), both)
    while engine.stats().running == 0:
        engine.step()
    reads = store.reads
    engine.submit("next", PROMPT, GREEDY, [AdapterUse("a")])
    engine.step()
    store.fetch(ref).result()  # behind the other in the reader's queue
    assert ref.digest in store.host and store.reads == reads + 1
    assert engine.scheduler.waiting, "there is no place for it yet"
    engine.cancel("busy")
    while engine.has_requests:
        if not engine.step():
            engine.inbox.wait(0.01)


def test_what_is_ready_is_written_by_the_reader_as_well(ahead: LLM, tiny_world: TinyWorld) -> None:
    """However soon the reader has it: the step loop's thread, which asks, must not wait for a copy."""
    store = ahead.engine.store
    assert store is not None
    ref = store.add("ready", str(tiny_world.adapters["a"]))
    threads: list[str] = []
    loads = AdapterLoads(
        store,
        lambda load, weights: threads.append(threading.current_thread().name),
        lambda ref, failure: threads.append(f"failed: {failure}") if failure else None,
    )
    for _ in range(100):
        loads.start(AdapterLoad(ref, 0))
    store.fetch(ref).result()  # behind them all
    assert len(threads) == 100 and {name.rpartition("_")[0] for name in threads} == {
        "adapter-reader"
    }
    store.remove("ready")


def test_prefetches_are_few_and_never_doubled() -> None:
    asked: list[tuple[str, Future[Any]]] = []

    def fetch(ref: AdapterRef) -> Future[Any]:
        asked.append((ref.digest, Future()))
        return asked[-1][1]

    store = SimpleNamespace(host={"here"}, fetch=fetch)
    loads = AdapterLoads(store, lambda *_: None, lambda *_: None)  # type: ignore[arg-type]
    names = ["here", "a", "a", *"bcdefg"]
    for name in names:
        loads.prefetch(AdapterRef(name, name, "", 1, 1))
    assert [digest for digest, _ in asked] == list("abcd") and len(asked) == MAX_PREFETCHES
    asked[0][1].set_exception(EngineError("gone"))  # nobody minds; its load will tell
    loads.prefetch(AdapterRef("e", "e", "", 1, 1))
    assert asked[-1][0] == "e"
