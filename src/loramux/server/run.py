"""The serving process: bind, load, listen; at a signal stop accepting, drain, leave.

A running request always hears how it ended: it finishes, or it gets an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import shlex
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import uvicorn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loramux.config import EngineConfig, ServerConfig
from loramux.engine.default_adapters import default_sources, is_default
from loramux.errors import ConfigError, EngineStopped
from loramux.server.adapter_paths import check_name
from loramux.server.app import create_app
from loramux.server.state import ServerState

if TYPE_CHECKING:  # the engine imports torch, which is not needed to refuse a taken port
    from loramux.engine.service import AsyncEngine

logger = logging.getLogger(__name__)

FLUSH_S = 3.0  # after the last answer has ended: time for it to reach the client
POLL_S = 0.1
EXIT_STUCK = 2
ANY_ADDRESS = ("0.0.0.0", "::")


class AdapterSource(NamedTuple):
    """An adapter to load before the server listens."""

    name: str
    path: str


def serve(
    engine_config: EngineConfig, config: ServerConfig, adapters: Sequence[AdapterSource] = ()
) -> int:
    """Build the engine and serve until a signal; 0 after a clean end.

    Raises ConfigError, AdapterRejected and the like before anything is served, and EngineStopped
    when the engine has died.
    """
    listener = bind(config.host, config.port)  # first: loading a model for a taken port is a waste
    with contextlib.closing(listener):
        from loramux.engine.memory_table import show
        from loramux.engine.service import AsyncEngine

        engine = AsyncEngine.create(engine_config)
        show(engine.memory)
        try:
            return serve_engine(engine, config, adapters, listener)
        except EngineStopped as error:
            if engine.stuck:  # an orderly exit would wait for its thread
                print(f"loramux: error: {error}", file=sys.stderr, flush=True)
                os._exit(EXIT_STUCK)
            raise


def serve_engine(
    engine: AsyncEngine,
    config: ServerConfig,
    adapters: Sequence[AdapterSource],
    listener: socket.socket,
) -> int:
    """`serve` with an engine that exists and a bound socket."""
    return asyncio.run(_run(engine, config, adapters, listener))


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            field="port",
            remedy="choose another --port or --host; --port 0 takes a free one",
        ) from error
    return listener


async def _run(
    engine: AsyncEngine,
    config: ServerConfig,
    adapters: Sequence[AdapterSource],
    listener: socket.socket,
) -> int:
    app = None
    try:
        app = create_app(engine, config, owns_engine=False)
        await engine.start()
        await _load_all(engine, adapters)
        server = _Server(
            uvicorn.Config(
                app,
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(config.shutdown_timeout_s + FLUSH_S),
            )
        )
        await _Life(app.state.loramux, server, listener).live()
    finally:
        if app is not None:
            app.state.loramux.media.close()
        await engine.stop(0.0)
    if engine.failure is not None:
        raise EngineStopped(f"the engine has died: {engine.failure!r}") from engine.failure
    return 0


async def _load_all(engine: AsyncEngine, adapters: Sequence[AdapterSource]) -> None:
    """Load every adapter, those of `default_mm_loras` too; the first that fails ends it all."""
    sources = [(check_name(source.name), source.path) for source in adapters]
    sources += default_sources(engine.config.lora)
    columns = (
        TextColumn("Loading adapters"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[adapter]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sources) as progress:
        task = progress.add_task("adapters", total=len(sources), adapter="")
        async for ref in engine.add_adapters(sources):
            progress.update(task, advance=1, adapter=ref.name)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which know nothing of an engine to drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Life:
    """One run of the server, from listening to the last byte sent."""

    def __init__(
        self,
        state: ServerState,
        server: _Server,
        listener: socket.socket,
    ) -> None:
        self._state = state
        self._server = server
        self._engine = state.engine
        self._config = state.config
        self._listener = listener
        self._signals = 0
        self._ending: asyncio.Task[None] | None = None
        self._serving: asyncio.Task[None] | None = None

    async def live(self) -> None:
        loop = asyncio.get_running_loop()
        handled = (signal.SIGINT, signal.SIGTERM)
        for number in handled:
            loop.add_signal_handler(number, self._on_signal)
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({self._serving})
            if not self._serving.cancelled():
                self._serving.result()
            if self._ending is not None:
                await asyncio.wait({self._ending})
        finally:
            watch.cancel()
            for number in handled:
                loop.remove_signal_handler(number)

    async def _watch(self) -> None:
        """Say when the server is ready; end it when the engine dies."""
        while not self._server.started:
            await asyncio.sleep(POLL_S / 10)
        served = (status.ref.name for status in self._engine.adapters())
        named = next((name for name in served if not is_default(name)), None)
        model = named or self._engine.config.model_names[0]
        announce(self._config, self._listener.getsockname()[1], model)
        while self._engine.failure is None:
            await asyncio.sleep(POLL_S)
        logger.error("the engine has died", exc_info=self._engine.failure)
        self._end(self._drain(0.0))

    def _on_signal(self) -> None:
        self._signals += 1
        if self._signals == 1:
            self._end(self._drain(self._config.shutdown_timeout_s))
        elif self._signals == 2:
            self._end(self._leave_now())

    def _end(self, how: Coroutine[Any, Any, None]) -> None:
        if self._ending is not None:
            self._ending.cancel()
        self._ending = asyncio.create_task(how)

    async def _drain(self, drain_s: float) -> None:
        self._state.draining = True
        self._server.should_exit = True
        await self._engine.stop(drain_s)

    async def _leave_now(self) -> None:
        """End every request with an error, give that a moment to be sent, and go."""
        await self._drain(0.0)
        assert self._serving is not None
        await asyncio.wait({self._serving}, timeout=FLUSH_S)
        self._serving.cancel()


def announce(config: ServerConfig, port: int, model: str) -> None:
    """Where the server is, and a command that tries it with `model`."""
    shown = f"[{config.host}]" if ":" in config.host else config.host
    print(f"Listening on http://{shown}:{port}", flush=True)
    reachable = "127.0.0.1" if config.host in ANY_ADDRESS else shown
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Write one sentence about the sea."}],
        "max_tokens": 32,
    }
    key = ' -H "Authorization: Bearer $API_KEY"' if config.has_keys else ""
    print(
        f"Try: curl http://{reachable}:{port}/v1/chat/completions"
        f" -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body))}",
        flush=True,
    )
