"""The engine: requests in, Deltas out, one step at a time.

`submit`, `cancel`, `add_adapter` and `remove_adapter` may be called from any thread; `step` belongs
to one. Files are read and rank rows written in the adapter reader's thread, never in a step.

Where the runner runs ahead, a call of `step` launches one step and reads the one launched before:

    plan 1, launch 1 | plan 2, launch 2, read 1 | plan 3, launch 3, read 2 | ...
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from loramux.adapters.store import AdapterStore
from loramux.config import EngineConfig, plan_memory
from loramux.engine.adapter_parts import make_loads, make_store, tell_evictions
from loramux.engine.admission import Admission
from loramux.engine.answers import AnswerWriter
from loramux.engine.collector import settle
from loramux.engine.devices import make_runner
from loramux.engine.hold import Hold
from loramux.engine.inbox import Inbox
from loramux.engine.leading import start
from loramux.engine.media_prompts import MediaPrompts
from loramux.engine.memory_table import summary
from loramux.engine.plan import StepPlan, StepResult
from loramux.engine.pooling import Pooler, PoolingModel
from loramux.engine.prompts import media_prompts, text_processor
from loramux.engine.runner import Running
from loramux.engine.scheduling import make_scheduler
from loramux.engine.sequence import Sequence as Answer
from loramux.engine.sequence import answers_of
from loramux.engine.snapshot import snapshot
from loramux.errors import EngineError, EngineStopped, InvalidField, LoramuxError, Overloaded
from loramux.models.text import TextProcessor
from loramux.status import AdapterStatus, EngineStats
from loramux.types import (
    AdapterRef,
    AdapterUse,
    Delta,
    MediaPrompt,
    PoolingParams,
    Request,
    SamplingParams,
)

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  # in a row; then the device is taken to be lost


@dataclass(slots=True)
class _Open:
    """A request that has not got all its answers yet."""

    request: Request
    answers: list[Answer]
    remaining: int
    queued: bool = False


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A step that was launched and not read yet."""

    plan: StepPlan
    running: Running


class Engine:
    """One model, its adapters and everything in flight."""

    def __init__(self, config: EngineConfig):
        """Load the model and get ready; takes seconds. Raises ConfigError or UnsupportedModel."""
        started = start(config, make_runner)
        loaded = started.loaded
        self.config = started.config
        self.memory = plan_memory(self.config, started.facts)
        logger.info("memory: %s", summary(self.memory))
        self.text = text_processor(started)
        self.media = media_prompts(started)
        self.runner = started.runner
        self.inbox = Inbox()
        schema, inbox = loaded.attached.schema, self.inbox
        self.store = make_store(
            self.config, schema, self.runner, inbox, self._gone, self._pinned, self.text
        )
        self.loads = make_loads(self.store, self.runner, inbox, self._arrived)
        model = PoolingModel.of(loaded)
        self.admission = Admission(self.config, self.store, loaded.vocab_size, model)
        self.pooler = Pooler(model, self.store)
        self.scheduler = make_scheduler(self.config, self.runner.num_blocks, started.facts.encoder)
        tell_evictions(self.store, self.scheduler.adapters)
        eos = loaded.eos_token_ids | {i for i in [self.text.eos_token_id] if i is not None}
        assert self.config.max_model_len is not None
        self.writer = AnswerWriter(self.text, frozenset(eos), self.config.max_model_len)
        self._open: dict[str, _Open] = {}
        self._open_lock = threading.Lock()
        self._ids = itertools.count()
        self._seeds = random.Random(config.seed)
        self._out: list[Delta] = []
        self._in_flight: _InFlight | None = None
        self._failed_steps = 0
        self._totals = EngineStats()
        self._stopped = False
        self.team = started.team
        if self.team is not None:
            self.team.when_lost(lambda _: self.inbox.post(lambda: None))  # wakes the loop
        self._unsettle = settle()

    # --- requests, from any thread -------------------------------------------------------------

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int] | MediaPrompt,
        params: SamplingParams | PoolingParams,
        adapters: Sequence[AdapterUse] = (),
    ) -> tuple[AdapterRef, ...]:
        """Queue a request; its Deltas come out of `step`, one whole one where it is pooled. Returns the
        version of each adapter that the answer will come from.

        Raises a RequestError when it cannot be served, Overloaded when the queue is full and
        EngineStopped after `stop`.
        """
        if self._stopped:
            raise EngineStopped("the engine is shutting down")
        if len(self._open) >= self.config.max_queue_len + self.config.max_num_seqs:
            raise Overloaded("too many requests are waiting")
        token_ids, media = self.media.split(prompt)
        request = self.admission.admit(request_id, token_ids, params, adapters, media)
        with self._open_lock:
            if request_id in self._open:
                self.admission.release(request.adapters)
                raise InvalidField(f"request id {request_id!r} is in use", field="request_id")
            opened = _Open(request, answers_of(request, self._seeds, self._ids), params.n)
            self._open[request_id] = opened
        self.inbox.post(partial(self._enqueue, opened))
        return tuple(ref for ref, _ in request.adapters)

    def hold(self, adapters: Sequence[AdapterUse]) -> Hold:
        """Keep the versions that `adapters` mean now, until a prompt that is made for them was submitted
        with `Hold.uses`. Raises UnknownModel."""
        return Hold(None if self.store is None else self.store.registry, adapters)

    def text_of(self, adapters: Sequence[AdapterUse]) -> TextProcessor:
        """The tokenizer and chat template of requests with these adapters. Raises InvalidField where
        several bring one of their own."""
        text: TextProcessor | None = self.admission.text_of(adapters)
        return text or self.text

    def media_of(self, adapters: Sequence[AdapterUse]) -> MediaPrompts:
        """What makes prompts with media for requests with these adapters; raises as `text_of` does."""
        text: TextProcessor | None = self.admission.text_of(adapters)
        return self.media if text is None else self.media.with_text(text)

    def cancel(self, request_id: str) -> None:
        """End a request early; nothing more comes out for it."""
        self.inbox.post(partial(self._cancel, request_id))

    # --- adapters, from any thread -------------------------------------------------------------

    def add_adapter(self, name: str, path: str, **how: Any) -> AdapterRef:
        """Read an adapter and serve it; blocks the caller, not the steps. See `AdapterStore.add`."""
        return self.require_store().add(name, path, **how)

    def remove_adapter(self, name: str, *, expected: str | None = None) -> AdapterRef:
        """Stop serving an adapter; requests in flight finish on it. Raises AdapterNotFound."""
        return self.require_store().remove(name, expected=expected)

    def end_requests(self, digest: str, error: LoramuxError) -> None:
        """End every request in flight that uses this version with `error`."""
        self.inbox.post(partial(self._end_requests, digest, error))

    def adapters(self, *, draining: bool = False) -> list[AdapterStatus]:
        """One entry a served name; with `draining`, also one for each version that drains."""
        pool = self.scheduler.adapters
        if self.store is None or pool is None:
            return []
        return self.store.status(pool.is_resident, draining=draining)

    def require_store(self) -> AdapterStore:
        if self.store is None:
            raise InvalidField(
                "this engine serves no adapters", field="lora", remedy="start it with enable_lora"
            )
        return self.store

    # --- the loop's thread ---------------------------------------------------------------------

    def step(self) -> list[Delta]:
        """Take in what was posted, launch a step, return the news of the step that was read.

        That is the same step or, where the runner runs ahead, the one before.
        """
        self._take_in()
        if self.team is not None and self.team.lost is not None:
            raise self.team.lost
        plan = self.scheduler.plan(time.monotonic())
        for load in self.scheduler.take_loads():
            assert self.loads is not None
            self.loads.start(load)
        due = self._launch(plan)
        if self.runner.run_ahead:
            due, self._in_flight = self._in_flight, due
        if due is not None and (result := self._read(due)) is not None:
            self._write(due.plan, result)
        return self._take_out()

    @property
    def has_requests(self) -> bool:
        """Whether `step` has something to do, were it only to read a step in flight."""
        return bool(self._open) or self._in_flight is not None

    def wait(self) -> None:
        """Sleep until there may be something to do; call it when a step brought nothing."""
        if not self.scheduler.running and self._in_flight is None:
            # Waiting requests may be due for a place; the clock, not a message, tells.
            self.inbox.wait(0.02 if self.scheduler.waiting else None)

    def fail_all(self, error: LoramuxError) -> list[Delta]:
        """End every open request with `error`."""
        self._take_in()
        self._drop_in_flight()
        for opened in list(self._open.values()):
            self._end_all(opened, error)
        return self._take_out()

    def stop(self) -> None:
        """Refuse new requests from now on."""
        self._stopped = True
        self.inbox.post(lambda: None)

    def close(self) -> None:
        self.stop()
        if self.store is not None:
            self.store.close()
        self._drop_in_flight()
        if self.team is not None:
            self.team.close()
        self.runner.close()
        self._unsettle()

    def stats(self) -> EngineStats:
        """Counters at this moment; the cumulative ones never go down."""
        parts = (self.scheduler, self.store, self.memory, self.adapters(draining=True))
        return snapshot(self._totals, *parts)

    def check_integrity(self) -> None:
        """With nothing in flight: no block, place or adapter user has leaked."""
        self._take_in()
        self._drop_in_flight()
        assert not self._open, "requests are still open"
        self.scheduler.check_integrity()
        if self.store is not None:
            self.store.registry.check_integrity()

    def _enqueue(self, opened: _Open) -> None:
        opened.queued = True
        for answer in opened.answers:
            self.writer.open(answer)
            self.scheduler.add(answer)
        if self.loads is not None and self.scheduler.adapters is not None:
            for digest in opened.answers[0].digests:
                if not self.scheduler.adapters.is_resident(digest):
                    self.loads.prefetch(opened.answers[0].refs[digest])

    def _cancel(self, request_id: str) -> None:
        if (opened := self._open.get(request_id)) is None:
            return
        for answer in opened.answers:
            if answer.finish_reason is None:
                self._finish(answer, "abort")

    def _take_in(self) -> None:
        for action in self.inbox.drain():
            action()

    def _take_out(self) -> list[Delta]:
        deltas, self._out = self._out, []
        return deltas

    def _launch(self, plan: StepPlan) -> _InFlight | None:
        if not plan.rows:
            return None
        try:
            running = self.runner.launch(plan)
        except EngineStopped:  # a rank is lost: there is no device any more
            raise
        except Exception as error:
            self._step_failed(error, plan)
            return None
        self.scheduler.launched(plan)
        return _InFlight(plan, running)

    def _read(self, step: _InFlight) -> StepResult | None:
        try:
            result = step.running.read()
        except EngineStopped:
            raise
        except Exception as error:
            # What was launched since went on from this step's tokens.
            after = self._drop_in_flight()
            self._step_failed(error, step.plan, *([after.plan] if after else []))
            return None
        self._failed_steps = 0
        self._totals.steps += 1
        return result

    def _drop_in_flight(self) -> _InFlight | None:
        """Wait for the step in flight, and forget it."""
        step, self._in_flight = self._in_flight, None
        if step is not None:
            with contextlib.suppress(Exception):
                step.running.read()
        return step

    def _step_failed(self, error: Exception, *plans: StepPlan) -> None:
        """The device refused: the requests of these steps end with an error, the rest go on."""
        logger.error("a step failed", exc_info=error)
        self._failed_steps += 1
        failure = EngineError(f"the step failed: {type(error).__name__}: {error}")
        self.scheduler.media.lost()
        for plan in plans:
            for answer in self.scheduler.alive_in(plan):
                self._end(answer, failure)
        if self._failed_steps >= MAX_FAILED_STEPS:
            raise failure from error

    def _write(self, plan: StepPlan, result: StepResult) -> None:
        waiting = self.scheduler.media.not_encoded(result.not_encoded, plan.rows)
        for answer in self.scheduler.alive_in(plan) if waiting else ():
            if (key := waiting.get(answer.sequence_id)) is not None:
                error = result.not_encoded[key]
                self._end(answer, EngineError(f"the media cannot be encoded: {error}"))
        advanced = self.scheduler.commit(plan, result)
        self._totals.prompt_tokens += plan.num_tokens - len(result.sampled)
        self._totals.generation_tokens += len(advanced)
        for answer, sampled in advanced:
            delta = self.writer.add(answer, sampled)
            if delta is None:
                continue
            self._out.append(delta)
            if delta.finish_reason is not None:
                self._finish(answer, delta.finish_reason)
        if result.hidden:
            for answer, delta in self.pooler.answer(self.scheduler.alive_in(plan), result):
                self._out.append(delta)
                self._finish(answer, delta.finish_reason or "stop")

    def _end(self, answer: Answer, error: LoramuxError) -> None:
        """Finish an answer with an error that its client sees."""
        self._out.append(
            Delta(answer.request.request_id, answer.index, finish_reason="error", error=error)
        )
        self._finish(answer, "error")

    def _end_all(self, opened: _Open, error: LoramuxError) -> None:
        for answer in opened.answers:
            if answer.finish_reason is None:
                self._end(answer, error)

    def _end_requests(self, digest: str, error: LoramuxError) -> None:
        for opened in list(self._open.values()):
            if opened.queued and any(ref.digest == digest for ref, _ in opened.request.adapters):
                self._end_all(opened, error)

    def _finish(self, answer: Answer, reason: str) -> None:
        if answer.finish_reason is None:
            self.scheduler.finish(answer, reason)  # type: ignore[arg-type]
        self.writer.close(answer)
        request_id = answer.request.request_id
        opened = self._open[request_id]
        opened.remaining -= 1
        if opened.remaining == 0:
            with self._open_lock:
                del self._open[request_id]
            self.admission.release(opened.request.adapters)

    # --- adapters, on the loop's thread --------------------------------------------------------

    def _arrived(self, ref: AdapterRef, failure: LoramuxError | None) -> None:
        if failure is None:
            self._totals.device_loads += 1
            self.scheduler.loaded(ref.digest)
            self.require_store().on_device(ref.digest)
        else:
            for answer in self.scheduler.load_failed(ref.digest):
                self._end(answer, failure)
            self.require_store().registry.unpin_failed(ref.digest)

    def _pinned(self, refs: Mapping[str, AdapterRef]) -> None:
        self.scheduler.set_pins(refs)

    def _gone(self, digest: str) -> None:
        assert self.scheduler.adapters is not None
        self.scheduler.adapters.drop(digest)
