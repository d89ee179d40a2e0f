"""A load is on every replica or on none, whatever goes wrong, and a replica that missed it learns it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from loramux.errors import (
    AdapterConflict,
    AdapterExists,
    AdapterNotFound,
    AdapterRejected,
    EngineStopped,
    LoramuxError,
)
from loramux.replicas.catalog import Catalog, Entry, State
from loramux.types import AdapterRef


def reference(name: str, digest: str = "d") -> AdapterRef:
    return AdapterRef(name=name, digest=digest, source=f"/{name}", max_r=8, num_bytes=1)


class Replica:
    """Keeps what it is told; `refuse` and `digest` change what it says to a stage."""

    def __init__(self, refuse: LoramuxError | None = None, digest: str = "d") -> None:
        self.refuse, self.digest = refuse, digest
        self.known = State()
        self.staged: set[str] = set()
        self.served: dict[str, str] = {}
        self.slow = asyncio.Event()
        self.slow.set()

    async def state(self) -> State:
        return self.known

    async def stage(self, name: str, path: str, replace: bool) -> AdapterRef:
        await self.slow.wait()
        if self.refuse is not None:
            raise self.refuse
        self.staged.add(name)
        return reference(name, self.digest)

    async def discard(self, name: str) -> None:
        self.staged.discard(name)

    async def publish(self, name: str, digest: str, revision: int) -> None:
        self.staged.remove(name)
        self.served[name] = digest
        entries = {**self.known.entries, name: Entry(name, f"/{name}", reference(name, digest))}
        self.known = State(revision, entries, self.known.started_s)

    async def withdraw(self, name: str, revision: int) -> None:
        del self.served[name]


class Group:
    def __init__(self, *members: Replica) -> None:
        self.members = members

    async def call(self, method: str, *arguments: Any) -> list[Any]:
        calls = (getattr(member, method)(*arguments) for member in self.members)
        return await asyncio.gather(*calls, return_exceptions=True)


def test_a_load_and_an_unload_reach_every_replica() -> None:
    async def scenario() -> None:
        replicas = [Replica(), Replica(), Replica()]
        catalog = Catalog([], Group(*replicas))
        assert (await catalog.load("a", "/a", False)).digest == "d"
        assert [replica.served for replica in replicas] == [{"a": "d"}] * 3
        state = await catalog.state()
        assert state is not None and state.revision == 1 and set(state.entries) == {"a"}
        assert await catalog.state(known=1) is None
        await catalog.unload("a")
        assert [replica.served for replica in replicas] == [{}] * 3
        with pytest.raises(AdapterNotFound):
            await catalog.unload("a")

    asyncio.run(scenario())


def test_one_refusal_is_a_refusal_on_all() -> None:
    async def scenario() -> None:
        reason = AdapterRejected("a", ["its rank is 64"])
        replicas = [Replica(), Replica(reason)]
        catalog = Catalog([], Group(*replicas))
        with pytest.raises(AdapterRejected, match=r"its rank is 64 \(on 1 of 2 replicas"):
            await catalog.load("a", "/a", False)
        assert not any(replica.served or replica.staged for replica in replicas)
        state = await catalog.state()
        assert state is not None and state.revision == 0
        replicas[1].refuse = None
        await catalog.load("a", "/a", False)  # the name is free again

    asyncio.run(scenario())


def test_nodes_with_different_files_are_refused() -> None:
    async def scenario() -> None:
        replicas = [Replica(), Replica(digest="other")]
        with pytest.raises(AdapterRejected, match="2 different versions"):
            await Catalog([], Group(*replicas)).load("a", "/a", False)
        assert not any(replica.served or replica.staged for replica in replicas)

    asyncio.run(scenario())


def test_without_replicas_nothing_is_promised() -> None:
    with pytest.raises(EngineStopped):
        asyncio.run(Catalog([], Group()).load("a", "/a", False))


def test_a_second_load_of_the_name_meanwhile_is_refused_and_leaving_does_not_end_the_first() -> (
    None
):
    async def scenario() -> None:
        replica = Replica()
        replica.slow.clear()
        catalog = Catalog([], Group(replica))
        first = asyncio.create_task(catalog.load("a", "/a", False))
        await asyncio.sleep(0.01)
        with pytest.raises(AdapterExists):
            await catalog.load("a", "/a", False)
        first.cancel()
        replica.slow.set()
        await asyncio.sleep(0.01)
        assert replica.served == {"a": "d"} and not replica.staged

    asyncio.run(scenario())


def test_a_new_catalog_takes_the_newest_state_of_the_replicas() -> None:
    async def scenario() -> None:
        behind, ahead = Replica(), Replica()
        old = Catalog([("start", "/start")], Group(behind, ahead))
        await old.load("a", "/a", False)
        await Catalog([], Group(ahead)).load("b", "/b", False)
        new = await Catalog([("start", "/start")], Group(behind, ahead)).state()
        assert new is not None and new.revision == 2 and set(new.entries) == {"a", "b"}

    asyncio.run(scenario())


def test_the_first_to_read_an_adapter_of_the_start_decides_its_version() -> None:
    async def scenario() -> None:
        catalog = Catalog([("a", "/a")], Group())
        assert await catalog.confirm([reference("a", "one")]) == []
        assert await catalog.confirm([reference("a", "one")]) == []
        assert await catalog.confirm([reference("a", "two")]) == ["a"]

    asyncio.run(scenario())


def test_compare_and_set_is_decided_by_the_catalog() -> None:
    async def scenario() -> None:
        replicas = [Replica(digest="1" * 64), Replica(digest="1" * 64)]
        catalog = Catalog([], Group(*replicas))
        with pytest.raises(AdapterConflict) as refused:
            await catalog.load("a", "/a", True, expected="1" * 64)
        assert refused.value.current_digest is None and not replicas[0].staged
        await catalog.load("a", "/a", True, expected="none")
        for wrong in ("none", "2" * 12):
            with pytest.raises(AdapterConflict) as refused:
                await catalog.load("a", "/a", True, expected=wrong)
            assert refused.value.current_digest == "1" * 64
            with pytest.raises(AdapterConflict):
                await catalog.unload("a", expected=wrong)
        for replica in replicas:
            replica.digest = "2" * 64
        await catalog.load("a", "/a", True, expected="1" * 12)
        assert [replica.served["a"] for replica in replicas] == ["2" * 64] * 2
        ref = await catalog.unload("a", expected="2" * 64)
        assert ref is not None and ref.digest == "2" * 64

    asyncio.run(scenario())


def test_what_was_replaced_while_files_were_read_is_noticed() -> None:
    async def scenario() -> None:
        replica = Replica(digest="1" * 64)
        catalog = Catalog([], Group(replica))
        await catalog.load("a", "/a", False)
        replica.slow.clear()
        late = asyncio.create_task(catalog.load("a", "/a", True, expected="1" * 64))
        await asyncio.sleep(0.01)
        await catalog.unload("a")
        replica.slow.set()
        with pytest.raises(AdapterConflict):
            await late
        assert replica.served == {} and not replica.staged

    asyncio.run(scenario())
