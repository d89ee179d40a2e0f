"""Changes of adapters as asyncio sees them: unloads that drain, weights that come as bytes, and
listeners."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

from loramux.adapters.feed import QUEUE_LENGTH
from loramux.adapters.header import WEIGHTS_NAME
from loramux.adapters.peft_config import CONFIG_NAME
from loramux.engine.engine import Engine
from loramux.errors import AdapterUnloaded, EngineError, Overloaded
from loramux.status import AdapterEvent, Unloaded
from loramux.types import AdapterRef

POLL_S = 0.005
# From the end of the last request of a version to its rows being free: a load of it may be on its way.
FREE_S = 30.0
MAX_LISTENERS = 64


async def drain(engine: Engine, ref: AdapterRef, drain_s: float) -> Unloaded:
    """Wait until a version that was unloaded is gone and its memory free, at most `drain_s` seconds
    for its requests; then end those that are left with AdapterUnloaded.

    Returns at once where the same version is still served under another name.
    """
    registry = engine.require_store().registry
    deadline = time.monotonic() + drain_s
    ended = 0
    error = AdapterUnloaded(
        f"adapter {ref.name!r} was unloaded, and its requests had {drain_s:g} s to finish"
    )
    while registry.is_draining(ref.digest):
        if time.monotonic() >= deadline:
            ended = max(ended, registry.users(ref.digest))
            engine.end_requests(ref.digest, error)  # again, for those that were just coming in
        if time.monotonic() >= deadline + FREE_S:
            break
        await asyncio.sleep(POLL_S)
    return Unloaded(ref, ended, await _is_free(engine, ref.digest))


async def _is_free(engine: Engine, digest: str) -> bool:
    """Whether it is nowhere any more; waits for a load of it that is on its way."""
    store, pool = engine.require_store(), engine.scheduler.adapters
    assert pool is not None
    deadline = time.monotonic() + FREE_S
    while store.registry.version(digest) is None and time.monotonic() < deadline:
        if digest not in pool and digest not in store.host:
            return True
        await asyncio.sleep(POLL_S)
    return False


@contextlib.asynccontextmanager
async def received(
    engine: Engine, config: bytes, weights: AsyncIterator[bytes]
) -> AsyncIterator[str]:
    """A private folder with `adapter_config.json` and `adapter_model.safetensors`, written as the
    bytes come. It stays only as long as a version is served from it."""
    spool = engine.require_store().spool
    try:
        folder = await asyncio.to_thread(spool.folder)
    except OSError as error:
        raise EngineError(f"there is no room for the adapter: {error.strerror}") from error
    try:
        await _write(folder, config, weights)
        yield str(folder)
    except BaseException:
        await asyncio.to_thread(spool.drop, str(folder))
        raise


async def _write(folder: Path, config: bytes, weights: AsyncIterator[bytes]) -> None:
    try:
        await asyncio.to_thread((folder / CONFIG_NAME).write_bytes, config)
        with open(folder / WEIGHTS_NAME, "wb") as file:
            async for piece in weights:
                await asyncio.to_thread(file.write, piece)
    except OSError as error:
        raise EngineError(f"the adapter could not be kept: {error.strerror}") from error


async def events(
    engine: Engine, capacity: int = QUEUE_LENGTH
) -> AsyncIterator[list[AdapterEvent] | None]:
    """What happens to adapters from the first `anext` on, in batches; an empty one every second that
    nothing happens, and None as the last when this listener was too slow. Raises Overloaded where
    too many listen."""
    feed = engine.require_store().feed
    if feed.num_listeners >= MAX_LISTENERS:
        raise Overloaded(f"{MAX_LISTENERS} clients listen to adapters already", retry_after_s=10)
    loop, news = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        loop.call_soon_threadsafe(news.set)

    listener = feed.listen(wake, capacity)
    try:
        yield []
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), 1.0)
            news.clear()
            dropped = listener.dropped
            yield listener.take()
            if dropped:
                yield None
                return
    finally:
        feed.leave(listener)
