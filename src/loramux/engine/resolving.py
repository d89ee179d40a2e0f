"""Adapters that are loaded on first use: many may ask for one name, and one load answers them all.

    resolve(name) ─▶ refused a moment ago? ─▶ being loaded? wait with the others ─▶ find, load, serve

The event loop never waits for a file or a host: looking up and loading run in threads of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from loramux.adapters.resolvers import Refusals, Resolver
from loramux.config import LoRAConfig
from loramux.errors import (
    AdapterExists,
    AdapterNotFound,
    EngineStopped,
    LoramuxError,
    Overloaded,
    UnknownModel,
)
from loramux.types import is_adapter_name

logger = logging.getLogger(__name__)

MOST_PENDING = 64  # names that are looked up or loaded at once
POLL_S = 0.05
RETRY_AFTER_S = 5.0


def unknown(name: str) -> UnknownModel:
    return UnknownModel(
        f"there is no adapter {name!r}, and none of that name where adapters are looked up",
        field="model",
        remedy="GET /v1/models lists what is loaded",
    )


def resolver_of(config: LoRAConfig | None) -> Resolver | None:
    """The resolver that the settings ask for. Raises ConfigError."""
    if config is None or not config.resolves:
        return None
    return Resolver(config.adapter_roots or (), config.adapter_repositories or ())


def load_first(name: str, resolver: Resolver, load: Callable[[str, str], object]) -> None:
    """Look `name` up and load it, all in this thread. Raises UnknownModel, or what `load` raises."""
    for source in resolver.find(name):
        with contextlib.suppress(AdapterNotFound):
            load(name, source)
            return
    raise unknown(name)


class Resolving:
    """`resolve` belongs to the event loop."""

    def __init__(
        self,
        config: LoRAConfig,
        resolver: Resolver,
        load: Callable[[str, str], Awaitable[object]],
        is_served: Callable[[str], bool],
    ):
        """`load(name, source)` serves an adapter, or raises a LoramuxError."""
        self._resolver = resolver
        self._load = load
        self._is_served = is_served
        self._timeout_s = config.resolver_timeout_s
        self._refusals = Refusals(config.resolver_negative_ttl_s)
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="adapter-lookup")

    async def resolve(self, name: str) -> None:
        """Return when `name` is served, which it may be already.

        Raises UnknownModel where nothing of the name is allowed or there, what loading it raises
        (for a while without trying again), or Overloaded after `resolver_timeout_s`: the load goes
        on, and so it does when the caller is cancelled.
        """
        if self._is_served(name):
            return
        if not is_adapter_name(name):
            raise unknown(name[:128])
        if (error := self._refusals.get(name)) is not None:
            raise error
        task = self._loads.get(name)
        if task is None:
            if len(self._loads) >= MOST_PENDING:
                raise Overloaded("too many adapters are being looked up", retry_after_s=1.0)
            task = asyncio.create_task(self._find_and_load(name))
            self._loads[name] = task
            task.add_done_callback(lambda done: self._ended(name, done))
        done, _ = await asyncio.wait({task}, timeout=self._timeout_s)
        if not done:
            raise Overloaded(f"adapter {name!r} is still being loaded", retry_after_s=RETRY_AFTER_S)
        if task.cancelled():
            raise EngineStopped("the engine is shutting down")
        task.result()

    async def close(self) -> None:
        """End the waiting of whoever waits; reads that have begun end by themselves."""
        for task in list(self._loads.values()):
            task.cancel()
        await asyncio.gather(*self._loads.values(), return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        self._loads.pop(name, None)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, LoramuxError):
            logger.error("loading adapter %r on first use failed", name, exc_info=error)
        elif not isinstance(error, (EngineStopped, Overloaded)):
            self._refusals.put(name, error)

    async def _find_and_load(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        for source in await loop.run_in_executor(self._threads, self._resolver.find, name):
            with contextlib.suppress(AdapterNotFound):
                await self._load_once(name, source)
                return
        raise unknown(name)

    async def _load_once(self, name: str, source: str) -> None:
        """Load, or wait for somebody else who loads this name at the moment."""
        deadline_s = time.monotonic() + self._timeout_s
        while not self._is_served(name):
            try:
                await self._load(name, source)
                logger.info("loaded adapter %r on first use from %s", name, source)
                return
            except AdapterExists:
                if time.monotonic() > deadline_s:
                    raise
                await asyncio.sleep(POLL_S)
