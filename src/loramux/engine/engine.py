"""The engine: requests in, Deltas out, one step at a time.

`submit`, `cancel`, `add_adapter` and `remove_adapter` may be called from any thread; `step` belongs
to one. Files are read and rank rows written in the adapter reader's thread, never in a step.
"""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch

from loramux.adapters.pool import AdapterPool
from loramux.adapters.store import AdapterStore
from loramux.adapters.weights import AdapterWeights
from loramux.config import EngineConfig, resolve
from loramux.engine.answers import AnswerWriter
from loramux.engine.blocks import BlockPool
from loramux.engine.inbox import Inbox
from loramux.engine.plan import AdapterLoad, StepPlan, StepResult
from loramux.engine.runner import Runner
from loramux.engine.scheduler import Scheduler, SchedulerLimits
from loramux.engine.sequence import Sequence as Answer
from loramux.engine.validation import validate_request
from loramux.errors import (
    AdapterLoadFailed,
    EngineError,
    EngineStopped,
    InvalidField,
    LoramuxError,
    Overloaded,
)
from loramux.models.loader import load_model
from loramux.models.text import TextProcessor
from loramux.schema import ModelSchema
from loramux.types import (
    AdapterRef,
    AdapterStatus,
    AdapterUse,
    Delta,
    EngineStats,
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


class Engine:
    """One model, its adapters and everything in flight."""

    def __init__(self, config: EngineConfig):
        """Load the model and get ready; takes seconds. Raises ConfigError or UnsupportedModel."""
        loaded = load_model(config)
        self.config = resolve(config, loaded.facts)
        self.text = TextProcessor.load(
            config.tokenizer or config.model, config.revision, config.chat_template
        )
        self.vocab_size = loaded.vocab_size
        self.runner = Runner(loaded.attached, self.config, loaded.facts)
        self.inbox = Inbox()
        self.store = self._make_store(loaded.attached.schema)
        self.scheduler = self._make_scheduler()
        eos = loaded.eos_token_ids | {i for i in [self.text.eos_token_id] if i is not None}
        assert self.config.max_model_len is not None
        self.writer = AnswerWriter(self.text, frozenset(eos), self.config.max_model_len)
        self._open: dict[str, _Open] = {}
        self._open_lock = threading.Lock()
        self._ids = itertools.count()
        self._seeds = random.Random(config.seed)
        self._out: list[Delta] = []
        self._failed_steps = 0
        self._totals = EngineStats()
        self._stopped = False

    # --- requests, from any thread -------------------------------------------------------------

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        adapters: Sequence[AdapterUse] = (),
    ) -> None:
        """Queue a request; its Deltas come out of `step`.

        Raises a RequestError when it cannot be served, Overloaded when the queue is full and
        EngineStopped after `stop`.
        """
        if self._stopped:
            raise EngineStopped("the engine is shutting down")
        if len(self._open) >= self.config.max_queue_len + self.config.max_num_seqs:
            raise Overloaded("too many requests are waiting")
        params = validate_request(
            prompt_token_ids, params, self.config.max_model_len or 0, self.vocab_size
        )
        acquired = self._acquire(adapters)
        request = Request(
            request_id, tuple(prompt_token_ids), params, acquired, arrival_s=time.monotonic()
        )
        with self._open_lock:
            if request_id in self._open:
                self._release(request)
                raise InvalidField(f"request id {request_id!r} is in use", field="request_id")
            opened = _Open(request, self._answers(request), params.n)
            self._open[request_id] = opened
        self.inbox.post(partial(self._enqueue, opened))

    def cancel(self, request_id: str) -> None:
        """End a request early; nothing more comes out for it."""
        self.inbox.post(partial(self._cancel, request_id))

    def _acquire(self, uses: Sequence[AdapterUse]) -> tuple[tuple[AdapterRef, float], ...]:
        if not uses:
            return ()
        if self.store is None or self.config.lora is None:
            raise InvalidField(
                "this engine serves no adapters", field="lora", remedy="start it with enable_lora"
            )
        acquired = self.store.registry.acquire(uses)
        distinct = {ref.digest for ref, _ in acquired}
        if len(distinct) > self.config.lora.max_loras:
            self.store.registry.release([ref.digest for ref, _ in acquired])
            raise InvalidField(
                f"{len(distinct)} adapters in one request are more than max_loras "
                f"({self.config.lora.max_loras})",
                field="lora",
            )
        return acquired

    def _answers(self, request: Request) -> list[Answer]:
        seed = request.params.seed
        base = self._seeds.getrandbits(48) if seed is None else seed
        answers: list[Answer] = []
        for index in range(request.params.n):
            answers.append(
                Answer(
                    sequence_id=next(self._ids),
                    request=request,
                    index=index,
                    seed=base + index,
                    queued_at=request.arrival_s,
                    elder=answers[0] if answers else None,
                )
            )
        return answers

    # --- adapters, from any thread -------------------------------------------------------------

    def add_adapter(self, name: str, path: str, *, replace: bool = False) -> AdapterRef:
        """Read an adapter and serve it; blocks the caller, not the steps. See `AdapterStore.add`."""
        return self._require_store().add(name, path, replace=replace)

    def remove_adapter(self, name: str) -> AdapterRef:
        """Stop serving an adapter; requests in flight finish on it. Raises AdapterNotFound."""
        return self._require_store().remove(name)

    def adapters(self) -> list[AdapterStatus]:
        """One entry a served name."""
        pool = self.scheduler.adapters
        if self.store is None or pool is None:
            return []
        return self.store.status(pool.is_resident)

    def _require_store(self) -> AdapterStore:
        if self.store is None:
            raise InvalidField(
                "this engine serves no adapters", field="lora", remedy="start it with enable_lora"
            )
        return self.store

    # --- the loop's thread ---------------------------------------------------------------------

    def step(self) -> list[Delta]:
        """Take in what was posted, run one step, return the news of every answer."""
        for action in self.inbox.drain():
            action()
        plan = self.scheduler.plan(time.monotonic())
        self._start_loads()
        if plan.rows and (result := self._execute(plan)) is not None:
            self._write(plan, result)
        deltas, self._out = self._out, []
        return deltas

    @property
    def has_requests(self) -> bool:
        return bool(self._open)

    def wait(self) -> None:
        """Sleep until there may be something to do; call it when a step brought nothing."""
        if not self.scheduler.running:
            # Waiting requests may be due for a place; the clock, not a message, tells.
            self.inbox.wait(0.02 if self.scheduler.waiting else None)

    def fail_all(self, error: LoramuxError) -> list[Delta]:
        """End every open request with `error`."""
        for action in self.inbox.drain():
            action()
        for opened in list(self._open.values()):
            for answer in opened.answers:
                if answer.finish_reason is None:
                    self._end(answer, error)
        deltas, self._out = self._out, []
        return deltas

    def stop(self) -> None:
        """Refuse new requests from now on."""
        self._stopped = True
        self.inbox.post(lambda: None)

    def close(self) -> None:
        self.stop()
        if self.store is not None:
            self.store.close()

    def stats(self) -> EngineStats:
        """Counters at this moment; the cumulative ones never go down."""
        blocks, pool, store = self.scheduler.blocks, self.scheduler.adapters, self.store
        totals = self._totals
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            steps=totals.steps,
            preemptions=self.scheduler.preemptions,
            prompt_tokens=totals.prompt_tokens,
            generation_tokens=totals.generation_tokens,
            prefix_queries=blocks.queries,
            prefix_hits=blocks.hits,
            blocks_total=blocks.num_blocks,
            blocks_used=blocks.num_blocks - blocks.num_free,
            device_loads=totals.device_loads,
            device_evictions=pool.evictions if pool else 0,
            host_loads=store.reads if store else 0,
            host_evictions=store.host.evictions if store else 0,
            adapters=self.adapters(),
        )

    def check_integrity(self) -> None:
        """With nothing in flight: no block, place or adapter user has leaked."""
        for action in self.inbox.drain():
            action()
        assert not self._open, "requests are still open"
        self.scheduler.check_integrity()
        if self.store is not None:
            self.store.registry.check_integrity()

    def _make_store(self, schema: ModelSchema) -> AdapterStore | None:
        if (lora := self.config.lora) is None:
            return None
        return AdapterStore(
            schema,
            lora,
            getattr(torch, lora.lora_dtype),
            reserved_names=self.config.model_names,
            on_gone=lambda digest: self.inbox.post(partial(self._gone, digest)),
        )

    def _make_scheduler(self) -> Scheduler:
        config, lora = self.config, self.config.lora
        assert config.max_num_batched_tokens is not None
        limits = SchedulerLimits(
            config.max_num_seqs, config.max_num_batched_tokens, config.adapter_patience_s
        )
        blocks = BlockPool(
            self.runner.num_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        pool = AdapterPool(lora.max_loras, lora.max_lora_rank) if lora else None
        return Scheduler(limits, blocks, pool)

    def _enqueue(self, opened: _Open) -> None:
        for answer in opened.answers:
            self.writer.open(answer)
            self.scheduler.add(answer)

    def _cancel(self, request_id: str) -> None:
        if (opened := self._open.get(request_id)) is None:
            return
        for answer in opened.answers:
            if answer.finish_reason is None:
                self._finish(answer, "abort")

    def _execute(self, plan: StepPlan) -> StepResult | None:
        """Run the plan. If the device refuses, its requests end with an error and the rest go on."""
        try:
            result = self.runner.execute(plan)
        except Exception as error:
            logger.exception("a step failed")
            self._failed_steps += 1
            failure = EngineError(f"the step failed: {type(error).__name__}: {error}")
            ids = {row.sequence_id for row in plan.rows}
            for answer in [a for a in self.scheduler.running if a.sequence_id in ids]:
                self._end(answer, failure)
            if self._failed_steps >= MAX_FAILED_STEPS:
                raise failure from error
            return None
        self._failed_steps = 0
        self._totals.steps += 1
        return result

    def _write(self, plan: StepPlan, result: StepResult) -> None:
        self._totals.prompt_tokens += plan.num_tokens - len(result.sampled)
        self._totals.generation_tokens += len(result.sampled)
        for answer, sampled in self.scheduler.commit(plan, result):
            delta = self.writer.add(answer, sampled)
            if delta is None:
                continue
            self._out.append(delta)
            if delta.finish_reason is not None:
                self._finish(answer, delta.finish_reason)

    def _end(self, answer: Answer, error: LoramuxError) -> None:
        """Finish an answer with an error that its client sees."""
        self._out.append(
            Delta(answer.request.request_id, answer.index, finish_reason="error", error=error)
        )
        self._finish(answer, "error")

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
            self._release(opened.request)

    def _release(self, request: Request) -> None:
        if self.store is not None and request.adapters:
            self.store.registry.release([ref.digest for ref, _ in request.adapters])

    # --- adapters, on the loop's thread --------------------------------------------------------

    def _start_loads(self) -> None:
        for load in self.scheduler.take_loads():
            assert self.store is not None
            self.store.fetch(load.ref).add_done_callback(partial(self._place, load))

    def _place(self, load: AdapterLoad, future: Future[AdapterWeights]) -> None:
        """In the reader's thread: write the rows, then tell the loop."""
        done: Callable[[], None]
        try:
            self.runner.load(load, future.result())
            done = partial(self._loaded, load.ref)
        except LoramuxError as error:
            done = partial(self._load_failed, load.ref, error)
        except Exception as error:  # memory, or a bug: this request ends, the server does not
            logger.exception("loading adapter %r failed", load.ref.name)
            failure = AdapterLoadFailed(f"adapter {load.ref.name!r} could not be loaded: {error}")
            done = partial(self._load_failed, load.ref, failure)
        self.inbox.post(done)

    def _loaded(self, ref: AdapterRef) -> None:
        self._totals.device_loads += 1
        self.scheduler.loaded(ref.digest)

    def _load_failed(self, ref: AdapterRef, error: LoramuxError) -> None:
        for answer in self.scheduler.load_failed(ref.digest):
            self._end(answer, error)

    def _gone(self, digest: str) -> None:
        assert self.scheduler.adapters is not None
        self.scheduler.adapters.drop(digest)
