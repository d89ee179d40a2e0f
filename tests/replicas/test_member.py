"""Real engines that share a catalog: what one of them loads, all serve; who was away learns it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from loramux.config import EngineConfig, LoRAConfig
from loramux.engine.default_adapters import default_sources
from loramux.errors import (
    AdapterConflict,
    AdapterLoadFailed,
    AdapterNotFound,
    AdapterRejected,
    EngineStopped,
    Forbidden,
    InvalidField,
    PinRefused,
)
from loramux.replicas.catalog import Catalog
from loramux.replicas.member import MemberEngine
from loramux.types import AdapterUse, SamplingParams
from tiny import TinyWorld


class Present:
    """The members that can be reached, called as RemoteReplicas calls them."""

    def __init__(self) -> None:
        self.members: list[MemberEngine] = []

    async def call(self, method: str, *arguments: Any) -> list[Any]:
        async def one(member: MemberEngine) -> Any:
            if method == "state":
                return member.known
            return await getattr(member, method)(*arguments)

        return await asyncio.gather(*map(one, self.members), return_exceptions=True)


class Club:
    """A catalog and members of one tiny model."""

    def __init__(self, world: TinyWorld, *names: str) -> None:
        lora = LoRAConfig(max_loras=2, max_lora_rank=8, max_cpu_loras=4)
        self.config = EngineConfig(
            model=str(world.model), device="cpu", lora=lora, kv_cache_memory_bytes=4 << 20
        )
        self.world = world
        self.present = Present()
        self.catalog = Catalog([(n, str(world.adapters[n])) for n in names], self.present)
        self.all: list[MemberEngine] = []

    async def member(self) -> MemberEngine:
        engine = await asyncio.to_thread(MemberEngine.create, self.config)
        self.all.append(engine)
        await engine.start()
        await engine.join(self.catalog)
        self.present.members.append(engine)
        return engine

    async def close(self) -> None:
        for engine in self.all:
            await engine.stop()


Scenario = Callable[[Club], Coroutine[Any, Any, None]]


def play(world: TinyWorld, scenario: Scenario, *names: str) -> None:
    async def run() -> None:
        club = Club(world, *names)
        try:
            await scenario(club)
        finally:
            await club.close()

    asyncio.run(run())


def names(engine: MemberEngine) -> list[str]:
    return sorted(status.ref.name for status in engine.adapters())


async def tokens(engine: MemberEngine, name: str) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    answer = engine.generate("r", [5, 6, 7], params, [AdapterUse(name)])
    return [token async for delta in answer for token in delta.token_ids]


def test_changes_reach_all_and_who_comes_later(tiny_world: TinyWorld) -> None:
    async def scenario(club: Club) -> None:
        one, two = await club.member(), await club.member()
        await one.add_adapter("b", str(tiny_world.adapters["b"]))
        assert names(one) == names(two) == ["a", "b"]
        assert await tokens(one, "b") == await tokens(two, "b")

        club.present.members.remove(two)  # out of reach for a while
        await one.remove_adapter("a")
        await one.add_adapter("b", str(tiny_world.adapters["c"]), load_inplace=True)
        assert names(two) == ["a", "b"] and await tokens(one, "b") != await tokens(two, "b")
        await two.check()
        assert names(two) == ["b"] and await tokens(one, "b") == await tokens(two, "b")

        three = await club.member()
        assert names(three) == ["b"] and await tokens(three, "b") == await tokens(one, "b")
        digests = {status.ref.digest for engine in club.all for status in engine.adapters()}
        assert len(digests) == 1

    play(tiny_world, scenario, "a")


def test_default_adapters_are_served_by_all(tiny_world: TinyWorld) -> None:
    async def scenario(club: Club) -> None:
        lora = LoRAConfig(default_mm_loras={"image": str(tiny_world.adapters["a"])})
        club.catalog = Catalog(default_sources(lora), club.present)
        one, two = await club.member(), await club.member()
        assert names(one) == names(two) == ["~image"]
        await one.add_adapter("mine", str(tiny_world.adapters["a"]))
        assert await tokens(one, "~image") == await tokens(two, "mine")

    play(tiny_world, scenario)


def test_a_change_after_a_missed_one_brings_both(tiny_world: TinyWorld) -> None:
    async def scenario(club: Club) -> None:
        one, two = await club.member(), await club.member()
        club.present.members.remove(two)
        await one.add_adapter("a", str(tiny_world.adapters["a"]))
        club.present.members.append(two)
        await one.add_adapter("b", str(tiny_world.adapters["b"]))
        assert names(two) == ["a", "b"]
        await one.remove_adapter("b")
        assert names(one) == names(two) == ["a"]

    play(tiny_world, scenario)


def test_a_refusal_leaves_every_member_as_it_was(tiny_world: TinyWorld) -> None:
    async def scenario(club: Club) -> None:
        one, two = await club.member(), await club.member()
        before = await tokens(two, "a")
        with pytest.raises(AdapterRejected):
            await one.add_adapter("a", str(tiny_world.model), load_inplace=True)
        assert names(one) == names(two) == ["a"] and await tokens(two, "a") == before
        await two.add_adapter("a", str(tiny_world.adapters["b"]), load_inplace=True)
        assert await tokens(one, "a") != before

    play(tiny_world, scenario, "a")


def test_a_newcomer_that_cannot_read_an_adapter_lists_it_and_says_why(
    tiny_world: TinyWorld, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    shutil.copytree(tiny_world.adapters["a"], folder)

    async def scenario(club: Club) -> None:
        one = await club.member()
        await one.add_adapter("x", str(folder))
        shutil.copytree(tiny_world.adapters["b"], folder, dirs_exist_ok=True)
        two = await club.member()
        assert names(one) == names(two) == ["x"]
        with pytest.raises(AdapterLoadFailed, match="files have changed"):
            await tokens(two, "x")
        assert await tokens(one, "x")
        await one.add_adapter("x", str(folder), load_inplace=True)
        assert await tokens(one, "x") == await tokens(two, "x")

    play(tiny_world, scenario)


def test_an_adapter_of_the_start_must_be_readable(tiny_world: TinyWorld, tmp_path: Path) -> None:
    async def scenario(club: Club) -> None:
        club.catalog = Catalog([("x", str(tmp_path))], club.present)
        with pytest.raises(AdapterRejected):
            await club.member()

    play(tiny_world, scenario)


def test_a_dead_engine_fails_the_check(tiny_world: TinyWorld) -> None:
    async def scenario(club: Club) -> None:
        one = await club.member()
        one.failure = RuntimeError("lost")
        with pytest.raises(EngineStopped, match="lost"):
            await one.check()
        one.failure = None

    play(tiny_world, scenario)


def pinned(engine: MemberEngine) -> set[str]:
    return {status.ref.name for status in engine.adapters() if status.pinned}


def test_pins_are_on_all_and_who_comes_later(tiny_world: TinyWorld) -> None:
    async def scenario(club: Club) -> None:
        one, two = await club.member(), await club.member()
        await one.add_adapter("b", str(tiny_world.adapters["b"]))
        await two.pin_adapter("a")
        assert pinned(one) == pinned(two) == {"a"}
        with pytest.raises(PinRefused):  # of two places one stays free
            await one.pin_adapter("b")
        with pytest.raises(PinRefused):
            await one.add_adapter("c", str(tiny_world.adapters["c"]), pinned=True)
        assert names(one) == names(two) == ["a", "b"]
        await one.add_adapter("a", str(tiny_world.adapters["c"]), load_inplace=True)
        assert pinned(one) == pinned(two) == {"a"}, "a replacement keeps the pin"

        three = await club.member()
        assert pinned(three) == {"a"}
        club.present.members.remove(two)  # out of reach for a while
        await one.pin_adapter("a", False)
        await one.add_adapter("b", str(tiny_world.adapters["b"]), load_inplace=True, pinned=True)
        assert pinned(one) == pinned(three) == {"b"} and pinned(two) == {"a"}
        await two.check()
        assert pinned(two) == {"b"}
        with pytest.raises(AdapterNotFound):
            await one.pin_adapter("nobody")

    play(tiny_world, scenario, "a")


def test_a_version_that_was_expected_is_compared_for_all(tiny_world: TinyWorld) -> None:
    async def scenario(club: Club) -> None:
        one, two = await club.member(), await club.member()
        first = one.adapters()[0].ref.digest
        path = str(tiny_world.adapters["b"])
        await two.add_adapter("a", path, load_inplace=True, expected_digest=first)
        with pytest.raises(AdapterConflict) as late:
            await one.add_adapter("a", path, load_inplace=True, expected_digest=first)
        second = one.adapters()[0].ref.digest
        assert late.value.current_digest == second != first
        with pytest.raises(AdapterConflict):
            await one.remove_adapter("a", expected_digest=first)
        assert (await two.remove_adapter("a", expected_digest=second)).ref.digest == second
        assert names(one) == names(two) == []

    play(tiny_world, scenario, "a")


def test_what_concerns_one_server_is_refused_by_name(tiny_world: TinyWorld) -> None:
    async def scenario(club: Club) -> None:
        one = await club.member()

        async def nothing() -> AsyncIterator[bytes]:
            yield b""

        with pytest.raises(InvalidField, match="drain_s"):
            await one.remove_adapter("a", drain_s=1)
        with pytest.raises(Forbidden, match="pushed"):
            await one.push_adapter("x", b"{}", nothing())
        for ask, path in ((one.residency, "/v1/adapters"), (one.adapter_events, "/events")):
            with pytest.raises(Forbidden, match=path):
                ask()
        assert names(one) == ["a"]

    play(tiny_world, scenario, "a")
