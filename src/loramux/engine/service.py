"""The engine as asyncio sees it: a step loop in a thread of its own, Deltas as async iterators.

News travels once a step: the loop's thread hands a whole step's Deltas to the event loop in one call.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

from loramux.config import EngineConfig, MemoryPlan
from loramux.engine.adapter_changes import drain, events, received
from loramux.engine.engine import Engine
from loramux.engine.hold import Hold
from loramux.engine.loop_thread import LoopThread
from loramux.engine.resolving import Resolving, resolver_of, unknown
from loramux.errors import EngineError, EngineStopped, LoramuxError
from loramux.media import Audio, Image, Video
from loramux.status import AdapterEvent, AdapterStatus, EngineStats, Unloaded
from loramux.types import AdapterRef, AdapterUse, Delta, MediaPrompt, PoolingParams, SamplingParams

logger = logging.getLogger(__name__)

MOST_LOADS = 8  # adapters that are downloaded or read at once
STUCK_S = 5.0  # from the loss of a rank to the end of waiting for the loop's thread


@dataclass(slots=True)
class _Asked:
    """A request of `generate`, and which of its answers have not ended."""

    open: set[int]
    queue: asyncio.Queue[Delta] = field(default_factory=asyncio.Queue)


class AsyncEngine:
    """What the server talks to."""

    def __init__(self, engine: Engine, thread: LoopThread):
        self._engine = engine
        self._thread = thread
        self.config: EngineConfig = engine.config
        self.memory: MemoryPlan = engine.memory
        self.failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked: dict[str, _Asked] = {}
        self._stopping = False
        self._halt = False
        self._running = False
        # Of their own: prompts are tokenized in asyncio's threads, and must not wait for downloads.
        self._loading = ThreadPoolExecutor(MOST_LOADS, thread_name_prefix="adapter-load")
        self._resolving = self._make_resolving()
        self.stuck = False
        """The loop's thread waits for a device that is lost, and cannot be ended."""
        if engine.team is not None:
            engine.team.when_lost(self._rank_lost)

    @classmethod
    def create(cls, config: EngineConfig) -> Self:
        """Load everything; takes seconds. Raises ConfigError or UnsupportedModel."""
        thread = LoopThread("step-loop")
        return cls(thread.submit(Engine, config).result(), thread)

    async def start(self) -> None:
        """Start the step loop on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._running = True
        self._thread.submit(self._run)

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, let running ones finish for `drain_s` seconds, end the rest with
        an EngineStopped error, and stop the loop."""
        self._stopping = True
        self._engine.stop()
        if self._resolving is not None:
            await self._resolving.close()
        deadline = time.monotonic() + drain_s
        while self._engine.has_requests and self.failure is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._halt = True
        self._engine.inbox.post(lambda: None)
        while self._running and not self.stuck:
            await asyncio.sleep(0.02)
        if self.stuck:
            assert self._engine.team is not None
            await asyncio.to_thread(self._engine.team.end)
            return
        self._loading.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._thread.close)
        await asyncio.to_thread(self._engine.close)

    # --- text ----------------------------------------------------------------------------------

    def hold(self, adapters: Sequence[AdapterUse]) -> Hold:
        """Keep versions while prompts are made for them; see `Engine.hold`."""
        return self._engine.hold(adapters)

    async def tokenize(
        self, text: str, adapters: Sequence[AdapterUse] = (), *, add_special_tokens: bool = True
    ) -> list[int]:
        """As a request with `adapters` has it. Raises InvalidField where several of them bring a
        tokenizer."""
        return await asyncio.to_thread(
            self._engine.text_of(adapters).encode, text, add_special_tokens=add_special_tokens
        )

    async def render_chat(
        self,
        messages: list[dict[str, Any]],
        adapters: Sequence[AdapterUse] = (),
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Messages -> prompt tokens. Raises InvalidField when the chat template refuses them."""
        return await asyncio.to_thread(
            self._engine.text_of(adapters).render_chat,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            template_kwargs=template_kwargs,
        )

    @property
    def modalities(self) -> frozenset[str]:
        """What a request may carry beside text; empty for a text model."""
        return self._engine.media.modalities

    async def render_chat_media(
        self,
        messages: list[dict[str, Any]],
        media: Sequence[Image | Audio | Video],
        adapters: Sequence[AdapterUse] = (),
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> MediaPrompt:
        """`render_chat` of a multimodal model; see `MediaPrompts.render_chat`."""
        return await asyncio.to_thread(
            self._engine.media_of(adapters).render_chat,
            messages,
            media,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )

    def decoder(self, adapters: Sequence[AdapterUse] = ()) -> Callable[[int], str]:
        """What writes one token of an answer with `adapters`."""
        text = self._engine.text_of(adapters)
        return lambda token_id: text.decode([token_id])

    # --- requests ------------------------------------------------------------------------------

    async def generate(
        self,
        request_id: str,
        prompt: Sequence[int] | MediaPrompt,
        params: SamplingParams | PoolingParams,
        adapters: Sequence[AdapterUse] = (),
        admitted: Callable[[Sequence[AdapterRef]], None] | None = None,
    ) -> AsyncIterator[Delta]:
        """Deltas of all n answers, or the one of a prompt that is pooled. Leaving the iterator early
        cancels the request. `admitted` is told, before the first Delta, which version of each of
        `adapters` they will come from.

        Raises RequestError, Overloaded or EngineStopped before the first Delta; later faults come
        as a Delta with an error.
        """
        if self._stopping or self.failure is not None:
            raise EngineStopped(
                "the engine is shutting down" if self._stopping else "the engine died"
            )
        asked = _Asked(set(range(params.n)))
        if request_id in self._asked:
            request_id = f"{request_id}-{id(asked):x}"
        self._asked[request_id] = asked
        remaining = params.n
        submitted = False
        try:
            versions = self._engine.submit(request_id, prompt, params, adapters)
            submitted = True
            if admitted is not None:
                admitted(versions)
            if self.failure is not None:  # it died between the two lines above
                raise EngineStopped("the engine died")
            while remaining:
                delta = await asked.queue.get()
                if delta.finished:
                    remaining -= 1
                yield delta
        finally:
            self._asked.pop(request_id, None)
            if submitted and remaining:
                self._engine.cancel(request_id)

    # --- adapters ------------------------------------------------------------------------------

    async def add_adapter(
        self,
        name: str,
        path: str,
        *,
        load_inplace: bool = False,
        expected_digest: str | None = None,
        pinned: bool | None = None,
    ) -> AdapterRef:
        """Read an adapter in a worker thread and serve it. See `AdapterStore.add`."""
        how = {"replace": load_inplace, "expected": expected_digest, "pinned": pinned}
        load = partial(self._engine.add_adapter, name, path, **how)
        return await asyncio.get_running_loop().run_in_executor(self._loading, load)

    async def push_adapter(
        self,
        name: str,
        config: bytes,
        weights: AsyncIterator[bytes],
        *,
        expected_digest: str | None = None,
        pinned: bool | None = None,
    ) -> AdapterRef:
        """Serve an adapter that comes as the bytes of its two files, in place of what is served under
        the name. Raises what `add_adapter` does, before the first byte is taken where it can."""
        registry = self._engine.require_store().registry
        registry.check_change(name, replace=True, expected=expected_digest, pinned=pinned)
        async with received(self._engine, config, weights) as folder:
            return await self.add_adapter(
                name, folder, load_inplace=True, expected_digest=expected_digest, pinned=pinned
            )

    async def add_adapters(self, sources: Sequence[tuple[str, str]]) -> AsyncIterator[AdapterRef]:
        """Read the adapters of (name, path), several at a time, and serve them in this order.

        Raises what `add_adapter` does for the first that fails, behind those served until then."""
        at_once = self._engine.require_store().checkers if sources else 1
        for start in range(0, len(sources), at_once):
            some = sources[start : start + at_once]
            staged = await asyncio.gather(
                *(self.stage_adapter(name, path) for name, path in some), return_exceptions=True
            )
            for (name, _), found in zip(some, staged, strict=True):
                if isinstance(found, BaseException):
                    for (other, _), ref in zip(some, staged, strict=True):
                        if not isinstance(ref, BaseException):
                            self.discard_adapter(other)
                    raise found
                yield self.publish_adapter(name)

    async def remove_adapter(
        self, name: str, *, drain_s: float | None = None, expected_digest: str | None = None
    ) -> Unloaded:
        """Stop serving an adapter. Requests in flight finish on it, with `drain_s` within that many
        seconds or with an AdapterUnloaded error; then this returns when its memory is free.

        Raises AdapterNotFound or AdapterConflict.
        """
        ref = self._engine.remove_adapter(name, expected=expected_digest)
        return Unloaded(ref) if drain_s is None else await drain(self._engine, ref, drain_s)

    async def pin_adapter(self, name: str, pinned: bool = True) -> AdapterRef:
        """Keep an adapter in host memory and on the device, or no longer. See `Registry.pin`."""
        return self._engine.require_store().registry.pin(name, pinned)

    def residency(self) -> list[AdapterStatus]:
        """Every version that there is, those too that drain."""
        return self._engine.adapters(draining=True)

    def adapter_events(self) -> AsyncIterator[list[AdapterEvent] | None]:
        """What happens to adapters from now on; see `adapter_changes.events`."""
        return events(self._engine)

    async def stage_adapter(
        self,
        name: str,
        path: str,
        *,
        load_inplace: bool = False,
        expected_digest: str | None = None,
        pinned: bool | None = None,
    ) -> AdapterRef:
        """Read and check an adapter, and keep its name until it is published or discarded."""
        stage = partial(
            self._engine.require_store().stage,
            name,
            path,
            replace=load_inplace,
            expected=expected_digest,
            pinned=pinned,
        )
        return await asyncio.get_running_loop().run_in_executor(self._loading, stage)

    async def resolve_adapter(self, name: str) -> None:
        """Serve an adapter that is looked up by its name. See `Resolving.resolve`; without roots and
        repositories nothing is looked up."""
        if self._resolving is None or name in self.config.model_names:
            raise unknown(name)
        await self._resolving.resolve(name)

    def _make_resolving(self) -> Resolving | None:
        if (resolver := resolver_of(self.config.lora)) is None:
            return None
        assert self.config.lora is not None
        registry = self._engine.require_store().registry
        return Resolving(
            self.config.lora,
            resolver,
            load=self.add_adapter,
            is_served=lambda name: registry.current(name) is not None,
        )

    def staged_digest(self, name: str) -> str | None:
        ref = self._engine.require_store().staged(name)
        return ref.digest if ref else None

    def publish_adapter(self, name: str) -> AdapterRef:
        """Serve what was staged under this name."""
        return self._engine.require_store().publish(name)

    def discard_adapter(self, name: str) -> None:
        """Forget what was staged, if anything was."""
        self._engine.require_store().discard(name)

    def adapters(self) -> list[AdapterStatus]:
        return self._engine.adapters()

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def on_load(self, callback: Callable[[AdapterRef, float], None]) -> None:
        """Call `callback(ref, seconds)`, in any thread, whenever an adapter has been read."""
        if self._engine.store is not None:
            self._engine.store.on_load = callback

    # --- the loop's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._halt:
                deltas = self._engine.step()
                if deltas:
                    self._publish(deltas)
                elif not self._halt:
                    self._engine.wait()
            self._publish(self._engine.fail_all(EngineStopped("the server is shutting down")))
        except BaseException as error:
            logger.exception("the step loop died")
            self.failure = error
            reason = error if isinstance(error, LoramuxError) else EngineError("the engine died")
            self._engine.stop()
            self._publish(self._engine.fail_all(reason))
        finally:
            self._running = False

    def _publish(self, deltas: list[Delta]) -> None:
        if deltas and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, deltas)

    def _deliver(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if (asked := self._asked.get(delta.request_id)) is not None:
                if delta.finished:
                    asked.open.discard(delta.index)
                asked.queue.put_nowait(delta)

    # --- when a rank is lost, and the loop's thread with it ------------------------------------

    def _rank_lost(self, error: LoramuxError) -> None:
        timer = threading.Timer(STUCK_S, self._give_up, (error,))
        timer.daemon = True
        timer.start()

    def _give_up(self, error: LoramuxError) -> None:
        """End every open request without the loop's thread, should that one not come back."""
        if not self._running:
            return
        logger.error("the step loop is stuck and is left behind")
        self.stuck = True
        self.failure = error
        self._engine.stop()
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end_all, error)

    def _end_all(self, error: LoramuxError) -> None:
        for request_id, asked in self._asked.items():
            for index in list(asked.open):
                end = Delta(request_id, index, finish_reason="error", error=error)
                asked.queue.put_nowait(end)
            asked.open.clear()
