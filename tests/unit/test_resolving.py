"""Loading on first use: one load for many requests, and failures are remembered for a while."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from loramux.adapters.resolvers import Resolver
from loramux.config import LoRAConfig
from loramux.engine import resolving as resolving_module
from loramux.engine.resolving import Resolving
from loramux.errors import (
    AdapterExists,
    AdapterNotFound,
    AdapterRejected,
    EngineStopped,
    Overloaded,
    SourceUnavailable,
    UnknownModel,
)


class Stage:
    """A `Resolving` over `memory://r` whose loads a test controls."""

    def __init__(self, **settings: Any):
        self.served: set[str] = set()
        self.loads: list[tuple[str, str]] = []
        self.outcome: Callable[[str], Awaitable[None]] = self._fine
        config = LoRAConfig(adapter_roots=["memory://r"], **settings)
        resolver = Resolver(config.adapter_roots or (), ["org/*"])
        self.resolving = Resolving(config, resolver, self._load, self.served.__contains__)

    async def _fine(self, name: str) -> None:
        await asyncio.sleep(0)

    async def _load(self, name: str, source: str) -> None:
        self.loads.append((name, source))
        await self.outcome(name)
        self.served.add(name)

    async def resolve(self, *names: str) -> list[Any]:
        found = await asyncio.gather(
            *(self.resolving.resolve(name) for name in names), return_exceptions=True
        )
        return list(found)


def run(test: Callable[[Stage], Awaitable[None]], **settings: Any) -> None:
    async def whole() -> None:
        stage = Stage(**settings)
        try:
            await test(stage)
        finally:
            await stage.resolving.close()

    asyncio.run(whole())


def test_one_load_for_many_requests() -> None:
    async def test(stage: Stage) -> None:
        gate = asyncio.Event()

        async def wait(name: str) -> None:
            await gate.wait()

        stage.outcome = wait
        asked = asyncio.create_task(stage.resolve(*["a"] * 50, "b"))
        while len(stage.loads) < 2:
            await asyncio.sleep(0.001)
        gate.set()
        assert await asked == [None] * 51
        assert sorted(stage.loads) == [("a", "memory://r/a"), ("b", "memory://r/b")]
        assert await stage.resolve("a") == [None] and len(stage.loads) == 2

    run(test)


def test_failures_are_remembered_and_then_tried_again() -> None:
    async def test(stage: Stage) -> None:
        errors = [AdapterRejected("a", ["no"]), SourceUnavailable("down")]

        async def fail(name: str) -> None:
            raise errors[0]

        stage.outcome = fail
        for _ in range(2):
            first = await stage.resolve("a", "a", "a")
            assert first == [errors[0]] * 3
            assert await stage.resolve("a") == first[:1]
            errors.pop(0)
            await asyncio.sleep(0.06)
        assert len(stage.loads) == 2
        stage.outcome = stage._fine
        assert await stage.resolve("a") == [None]

    run(test, resolver_negative_ttl_s=0.05)


def test_what_is_nowhere_is_unknown_and_every_place_is_tried() -> None:
    async def test(stage: Stage) -> None:
        async def absent(name: str) -> None:
            raise AdapterNotFound("no")

        stage.outcome = absent
        [error] = await stage.resolve("org/a")
        assert isinstance(error, UnknownModel)
        assert stage.loads == [("org/a", "memory://r/org/a"), ("org/a", "hf://org/a")]
        [error] = await stage.resolve("../a")
        assert isinstance(error, UnknownModel) and len(stage.loads) == 2

    run(test)


def test_a_slow_load_ends_the_waiting_and_goes_on() -> None:
    async def test(stage: Stage) -> None:
        gate = asyncio.Event()

        async def wait(name: str) -> None:
            await gate.wait()

        stage.outcome = wait
        [error] = await stage.resolve("a")
        assert isinstance(error, Overloaded) and error.retry_after_s > 0
        gate.set()
        await asyncio.sleep(0.01)
        assert await stage.resolve("a") == [None] and len(stage.loads) == 1

    run(test, resolver_timeout_s=0.05)


def test_a_caller_that_leaves_does_not_end_the_load() -> None:
    async def test(stage: Stage) -> None:
        gate = asyncio.Event()

        async def wait(name: str) -> None:
            await gate.wait()

        stage.outcome = wait
        leaving = asyncio.create_task(stage.resolving.resolve("a"))
        staying = asyncio.create_task(stage.resolving.resolve("a"))
        while not stage.loads:
            await asyncio.sleep(0.001)
        leaving.cancel()
        gate.set()
        await staying
        assert stage.served == {"a"} and len(stage.loads) == 1

    run(test)


def test_somebody_elses_load_is_waited_for() -> None:
    async def test(stage: Stage) -> None:
        async def taken(name: str) -> None:
            raise AdapterExists("being loaded")

        stage.outcome = taken
        asked = asyncio.create_task(stage.resolve("a"))
        await asyncio.sleep(0.02)
        stage.served.add("a")
        assert await asked == [None]

    run(test)


def test_a_name_that_stays_taken_ends() -> None:
    async def test(stage: Stage) -> None:
        async def taken(name: str) -> None:
            raise AdapterExists("taken")

        stage.outcome = taken
        [error] = await stage.resolve("a")
        assert isinstance(error, (AdapterExists, Overloaded))
        await asyncio.sleep(0.3)
        assert not stage.resolving._loads

    run(test, resolver_timeout_s=0.1)


def test_names_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving_module, "MOST_PENDING", 3)

    async def test(stage: Stage) -> None:
        gate = asyncio.Event()

        async def wait(name: str) -> None:
            await gate.wait()

        stage.outcome = wait
        asked = [asyncio.create_task(stage.resolving.resolve(f"a{i}")) for i in range(3)]
        await asyncio.sleep(0)
        [error] = await stage.resolve("late")
        assert isinstance(error, Overloaded)
        gate.set()
        await asyncio.gather(*asked)
        assert await stage.resolve("late") == [None], "it was not remembered as refused"

    run(test)


def test_closing_ends_the_waiting() -> None:
    async def test(stage: Stage) -> None:
        async def forever(name: str) -> None:
            await asyncio.Event().wait()

        stage.outcome = forever
        asked = asyncio.create_task(stage.resolve("a", "b"))
        await asyncio.sleep(0.01)
        await stage.resolving.close()
        assert all(isinstance(error, EngineStopped) for error in await asked)

    run(test)


def test_the_loop_does_not_wait_for_a_lookup(tmp_path: Path) -> None:
    async def test(stage: Stage) -> None:
        begun, go_on = threading.Event(), threading.Event()

        def slowly(name: str) -> list[str]:
            begun.set()
            assert go_on.wait(10)
            return []

        stage.resolving._resolver.find = slowly  # type: ignore[method-assign]
        asked = asyncio.create_task(stage.resolve("a"))
        started = time.monotonic()
        while not begun.is_set():
            await asyncio.sleep(0.001)
        assert time.monotonic() - started < 5, "the loop went on meanwhile"
        go_on.set()
        [error] = await asked
        assert isinstance(error, UnknownModel)

    run(test)
