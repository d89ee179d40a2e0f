"""The engine behind asyncio under traffic: adapters replaced, clients leaving, nothing lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest

from loramux.config import EngineConfig, LoRAConfig
from loramux.engine.service import AsyncEngine
from loramux.errors import AdapterNotFound, EngineStopped, UnknownModel
from loramux.types import AdapterUse, SamplingParams
from tiny import TinyWorld

PROMPT = [5, 9, 44, 102, 33, 9, 9, 71]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def engine(tiny_world: TinyWorld, request: pytest.FixtureRequest) -> Iterator[AsyncEngine]:
    lora = LoRAConfig(max_loras=2, max_lora_rank=8, max_cpu_loras=3)
    yield AsyncEngine.create(
        EngineConfig(
            model=str(tiny_world.model),
            device="cpu",
            lora=lora,
            kv_cache_memory_bytes=600_000,
            max_model_len=64,
            adapter_patience_s=0.05,
            async_scheduling=request.param,
        )
    )


async def _answer(engine: AsyncEngine, name: str, *adapters: str) -> tuple[int, ...]:
    uses = [AdapterUse(adapter) for adapter in adapters]
    deltas = [d async for d in engine.generate(name, PROMPT, GREEDY, uses)]
    assert [d.finished for d in deltas].count(True) == 1
    assert deltas[-1].finish_reason == "length", deltas[-1].error
    return tuple(t for d in deltas for t in d.token_ids)


async def _leave_early(engine: AsyncEngine, name: str, adapter: str) -> None:
    long = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, n=2)
    stream = engine.generate(name, PROMPT, long, [AdapterUse(adapter)])
    async for _ in stream:
        break
    await stream.aclose()  # type: ignore[attr-defined]


def test_many_adapters_are_served_in_their_order(
    engine: AsyncEngine, tiny_world: TinyWorld
) -> None:
    paths = {name: str(path) for name, path in tiny_world.adapters.items()}
    wanted = [(f"{name}{i}", paths[name]) for i in range(2) for name in "dacb"]

    async def run() -> None:
        await engine.start()
        engine._engine.require_store().checkers = 3
        added = [ref.name async for ref in engine.add_adapters(wanted)]
        served = [status.ref.name for status in engine.adapters()]
        assert added == served == [name for name, _ in wanted]
        more = [("good", paths["a"]), ("bad", paths["a"] + "/no"), ("late", paths["b"])]
        with pytest.raises(AdapterNotFound):
            async for _ in engine.add_adapters(more):
                pass
        names = {status.ref.name for status in engine.adapters()}
        assert "good" in names and not names & {"bad", "late"}
        await engine.add_adapter("late", paths["b"])  # nobody holds the name
        await engine.stop(0.0)

    asyncio.run(run())


def test_traffic_with_live_changes(engine: AsyncEngine, tiny_world: TinyWorld) -> None:
    async def run() -> None:
        rng = random.Random(0)
        await engine.start()
        for name, path in tiny_world.adapters.items():
            await engine.add_adapter(name, str(path))
        expected = {n: await _answer(engine, f"alone-{n}", n) for n in "abcd"}
        expected["base"] = await _answer(engine, "alone-base")
        await engine.add_adapter("x", str(tiny_world.adapters["a"]))

        async def change() -> None:
            for i in range(20):
                version = "ab"[(i + 1) % 2]
                await engine.add_adapter("x", str(tiny_world.adapters[version]), load_inplace=True)
                await asyncio.sleep(0.01)

        async def check(i: int) -> None:
            await asyncio.sleep(rng.random())
            kind = rng.choice(["a", "b", "c", "d", "base", "x", "leave"])
            if kind == "leave":
                await _leave_early(engine, f"r{i}", rng.choice("abcd"))
            elif kind == "base":
                assert await _answer(engine, f"r{i}") == expected["base"]
            elif kind == "x":
                assert await _answer(engine, f"r{i}", "x") in (expected["a"], expected["b"])
            else:
                assert await _answer(engine, f"r{i}", kind) == expected[kind]

        await asyncio.gather(change(), *(check(i) for i in range(150)))
        with pytest.raises(UnknownModel):
            await _answer(engine, "nobody", "nobody")
        while engine.stats().running or engine.stats().waiting:
            await asyncio.sleep(0.01)
        await engine.stop()
        engine._engine.check_integrity()

    asyncio.run(run())


def test_stopping_ends_every_request_with_an_error(engine: AsyncEngine) -> None:
    async def run() -> None:
        await engine.start()
        long = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, n=2)

        async def ask(i: int) -> list[object]:
            deltas = [d async for d in engine.generate(str(i), PROMPT, long)]
            return [d.error for d in deltas if d.finished]

        tasks = [asyncio.create_task(ask(i)) for i in range(20)]
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        await engine.stop(0.0)
        ends = [end for errors in await asyncio.gather(*tasks) for end in errors]
        assert len(ends) == 40
        assert any(isinstance(end, EngineStopped) for end in ends)
        with pytest.raises(EngineStopped):
            await ask(99)

    asyncio.run(run())


def test_a_dead_loop_ends_every_request(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        await engine.start()

        def broken(now: float) -> None:
            raise RuntimeError("the plan is mad")

        monkeypatch.setattr(engine._engine.scheduler, "plan", broken)
        deltas = [d async for d in engine.generate("r", PROMPT, GREEDY)]
        assert deltas[-1].finish_reason == "error"
        assert isinstance(engine.failure, RuntimeError)
        with pytest.raises(EngineStopped):
            await _answer(engine, "s")
        await engine.stop()

    asyncio.run(run())
