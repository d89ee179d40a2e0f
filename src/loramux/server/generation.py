"""All answers of one HTTP request: prompts run concurrently, their deltas arrive in one stream."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from loramux.engine.activation import not_invoked
from loramux.engine.hold import Hold
from loramux.errors import EngineError, EngineStopped, QuotaReached
from loramux.server.metrics import Meter
from loramux.server.quotas import Grant
from loramux.server.state import ServerState
from loramux.types import (
    AdapterRef,
    Delta,
    MediaPrompt,
    PoolingOutput,
    PoolingParams,
    SamplingParams,
    TokenLogprobs,
)

Prompt = Sequence[int] | MediaPrompt
Version = tuple[str, AdapterRef]  # under the name that was asked for


def tokens_of(prompt: Prompt) -> Sequence[int]:
    return prompt.token_ids if isinstance(prompt, MediaPrompt) else prompt


class Event(NamedTuple):
    """News of one choice; `choice` is prompt * n + index, the order in which choices are listed."""

    prompt: int
    choice: int
    delta: Delta


class Generation:
    """An async iterator of Events. `prime` first, so that a client's fault is known before the
    response begins; `aclose` always, which cancels whatever still runs.

    Iterating raises LoramuxError when an answer fails; the others are then cancelled too.
    """

    def __init__(
        self,
        state: ServerState,
        prompts: Sequence[Prompt],
        params: SamplingParams | PoolingParams,
        hold: Hold,
    ) -> None:
        """`hold` has the versions that the prompts were made for, and is released as soon as all of them
        are requests."""
        self._state = state
        self._prompts = prompts
        self._params = params
        self._adapters = hold.uses
        self._hold = hold
        self._unsubmitted = len(prompts)
        self._id = uuid.uuid4().hex  # never the client's: two requests may bring the same one
        self._queue: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._unfinished = len(prompts) * params.n
        self._first: Event | None = None
        self._failed = False
        self.versions: list[Version] = []
        """Which versions answer, each once; known as soon as the first event is."""
        self.not_invoked: list[Version] = []
        """Activated LoRAs that at least one prompt did not invoke, each once."""
        self._meter = Meter(state.metrics, hold.uses, choices=self._unfinished)
        self._grant: Grant | None = None  # from when it was admitted

    async def prime(self) -> None:
        """Start, and wait for the first event. Closes itself when that raises."""
        try:
            self._grant = self._admit()
            self._tasks = [
                asyncio.create_task(self._pump(index)) for index in range(len(self._prompts))
            ]
            self._first = await self._next()
        except BaseException:
            await self.aclose()
            raise

    def _admit(self) -> Grant:
        """Count the whole of it against its adapters' limits. Raises QuotaReached or InvalidField."""
        names = [use.name for use in self._adapters]
        tokens = sum(len(tokens_of(prompt)) for prompt in self._prompts)
        try:
            return self._state.quotas.admit(names, self._unfinished, tokens)
        except QuotaReached as error:
            self._failed = True
            self._state.metrics.refused(error)
            raise

    async def _pump(self, prompt: int) -> None:
        """Forward one prompt's deltas. Cancelling this task cancels the engine's request."""
        finished = 0
        num_tokens = len(tokens_of(self._prompts[prompt]))
        try:
            async for delta in self._state.engine.generate(
                f"{self._id}-{prompt}",
                self._prompts[prompt],
                self._params,
                self._adapters,
                partial(self._admitted, prompt),
            ):
                event = Event(prompt, prompt * self._params.n + delta.index, delta)
                finished += delta.finished
                self._meter.saw(prompt, event.choice, delta, num_tokens)
                if self._grant is not None:
                    self._grant.saw(event.choice, len(delta.token_ids), finished=delta.finished)
                self._queue.put_nowait(event)
            if finished < self._params.n:
                raise EngineStopped("the engine ended the request before its answer was complete")
        except Exception as error:
            self._queue.put_nowait(error)

    def _admitted(self, prompt: int, refs: Sequence[AdapterRef]) -> None:
        self._unsubmitted -= 1
        if self._unsubmitted == 0:
            self._hold.release()
        named = list(zip((use.name for use in self._adapters), refs, strict=True))
        self.versions += [version for version in named if version not in self.versions]
        idle = not_invoked(refs, tokens_of(self._prompts[prompt]))
        self.not_invoked += [
            version for version in named if version[1] in idle and version not in self.not_invoked
        ]

    async def _next(self) -> Event:
        item = await self._queue.get()
        if not isinstance(item, Exception) and item.delta.finish_reason == "error":
            item = item.delta.error or EngineError("the engine failed on this request")
        if isinstance(item, Exception):
            self._failed = True
            raise item
        self._unfinished -= item.delta.finished
        return item

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._first is not None:
            event, self._first = self._first, None
            return event
        if self._unfinished == 0:
            raise StopAsyncIteration
        return await self._next()

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._grant is not None:
            self._grant.close()
        self._meter.close("error" if self._failed else "abort")


@dataclass(slots=True)
class Choice:
    """One finished answer, put together from its deltas."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    pooled: PoolingOutput | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs or ())
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        self.pooled = delta.pooled


class Usage:
    """Token counts of one HTTP request, as they grow."""

    def __init__(self, prompts: Sequence[Prompt], n: int) -> None:
        self._prompt = sum(len(tokens_of(prompt)) for prompt in prompts)
        self._n = n
        self._completion = 0
        self._cached: dict[int, int] = {}

    def add(self, event: Event) -> None:
        self._completion += len(event.delta.token_ids)
        # A prompt counts once however large n is, so only its first answer's cache hits count.
        if event.choice % self._n == 0:
            known = self._cached.get(event.prompt, 0)
            self._cached[event.prompt] = max(known, event.delta.num_cached_tokens)

    def as_reply(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


async def collect(
    generation: Generation, prompts: Sequence[Prompt], n: int
) -> tuple[list[Choice], Usage]:
    """Run a generation to its end. Raises what it raises, and closes it either way."""
    choices = [Choice() for _ in range(len(prompts) * n)]
    usage = Usage(prompts, n)
    try:
        await generation.prime()
        async for event in generation:
            choices[event.choice].add(event.delta)
            usage.add(event)
    finally:
        await generation.aclose()
    return choices, usage


def has_news(return_token_ids: bool | None, news: Event) -> bool:
    """Whether a client sees anything in this delta; text may be held back for a stop string."""
    delta = news.delta
    shown_ids = bool(return_token_ids and delta.token_ids)
    return bool(delta.text or delta.logprobs or delta.finished or shown_ids)
