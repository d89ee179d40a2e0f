"""An AsyncEngine that is one of several: its adapters are the catalog's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace as changed
from typing import Any, Protocol

from loramux.engine.hold import Hold
from loramux.engine.service import AsyncEngine
from loramux.errors import (
    AdapterExists,
    AdapterLoadFailed,
    AdapterRejected,
    EngineStopped,
    Forbidden,
    InvalidField,
    LoramuxError,
)
from loramux.replicas.catalog import Entry, State
from loramux.status import AdapterEvent, AdapterStatus, Unloaded
from loramux.types import AdapterRef, AdapterUse, Delta, MediaPrompt, PoolingParams, SamplingParams

logger = logging.getLogger(__name__)


class CatalogClient(Protocol):
    """`Catalog` as a replica reaches it. Raises its errors, or EngineStopped if it is out of reach."""

    async def state(self, known: int = -1) -> State | None: ...
    async def confirm(self, refs: Sequence[AdapterRef]) -> list[str]: ...
    async def load(
        self,
        name: str,
        path: str,
        replace: bool,
        expected: str | None = None,
        pinned: bool | None = None,
    ) -> AdapterRef: ...
    async def unload(self, name: str, expected: str | None = None) -> AdapterRef | None: ...
    async def pin(self, name: str, pinned: bool) -> AdapterRef | None: ...


class MemberEngine(AsyncEngine):
    """What a replica's app talks to. `join` before it serves.

    A change that a client asks for goes to the catalog, whose `stage`, `publish`, `discard`, `withdraw`,
    `may_pin` and `set_pin` come back to every member. What concerns one server alone is refused.
    """

    catalog: CatalogClient
    known: State
    _missing: dict[str, str]  # name -> why this replica cannot serve it
    _changes: asyncio.Lock

    async def join(self, catalog: CatalogClient) -> None:
        """Load what the catalog has. Raises LoramuxError when an adapter of the start cannot be."""
        self.catalog = catalog
        self.known = State(revision=-1)
        self._missing = {}
        self._changes = asyncio.Lock()
        await self.catch_up()

    async def catch_up(self) -> None:
        """Come to the catalog's state, if this is not it."""
        async with self._changes:
            while (state := await self.catalog.state(self.known.revision)) is not None:
                await self._adopt(state)

    async def _adopt(self, state: State) -> None:
        own = {status.ref.name: status.ref.digest for status in super().adapters()}
        for name in own.keys() - state.entries.keys():
            await super().remove_adapter(name)
        await self._unpin_all_but(state)  # first: it makes room for others
        self._missing = {}
        first_read = []
        for entry in state.entries.values():
            if entry.ref is None:  # of the start: whoever cannot read it does not start
                first_read.append(await self._read_first(entry, own))
            elif own.get(entry.name) != entry.ref.digest:
                await self._read_again(entry, entry.ref)
        for name in await self.catalog.confirm(first_read) if first_read else ():
            raise AdapterRejected(
                name,
                ["another replica read another version from its path"],
                remedy="put the same files under this path on every node",
            )
        read = {ref.name: ref for ref in first_read}
        entries = {
            name: changed(entry, ref=read.get(name, entry.ref))
            for name, entry in state.entries.items()
        }
        for entry in entries.values():
            if entry.pinned and entry.name not in self._missing:
                await self._set_pin(entry.name, True)
        self.known = State(state.revision, entries, state.started_s)

    async def _unpin_all_but(self, state: State) -> None:
        for status in super().adapters():
            name = status.ref.name
            if status.pinned and not state.entries[name].pinned:
                await self._set_pin(name, False)

    async def _set_pin(self, name: str, pinned: bool) -> None:
        try:
            await super().pin_adapter(name, pinned)
        except LoramuxError as error:
            logger.error("adapter %r is not pinned on this replica: %s", name, error)

    async def _read_first(self, entry: Entry, own: dict[str, str]) -> AdapterRef:
        return await super().add_adapter(entry.name, entry.path, load_inplace=entry.name in own)

    async def _read_again(self, entry: Entry, ref: AdapterRef) -> None:
        """Serve the version that the others have, or remember why not."""
        try:
            read = await super().stage_adapter(entry.name, entry.path, load_inplace=True)
            if read.digest == ref.digest:
                super().publish_adapter(entry.name)
                return
            super().discard_adapter(entry.name)
            reason = "its files have changed since it was loaded"
        except AdapterExists:
            raise  # a load of it is under way: try again afterwards
        except LoramuxError as error:
            reason = str(error)
        logger.error("adapter %r cannot be served by this replica: %s", entry.name, reason)
        self._missing[entry.name] = reason

    # --- what the app sees ---------------------------------------------------------------------

    def serves(self, name: str) -> bool:
        store = self._engine.store
        return store is not None and store.registry.current(name) is not None

    def adapters(self) -> list[AdapterStatus]:
        """One entry a served name; those too that only the other replicas can read."""
        listed = super().adapters()
        absent = [self.known.entries[n] for n in self._missing if n in self.known.entries]
        return listed + [
            AdapterStatus(entry.ref, users=0, on_host=False, on_device=False, load_s=None)
            for entry in absent
            if entry.ref is not None
        ]

    def hold(self, adapters: Sequence[AdapterUse]) -> Hold:
        self._check_here(adapters)
        return super().hold(adapters)

    def _check_here(self, adapters: Sequence[AdapterUse]) -> None:
        for use in adapters:
            if (reason := self._missing.get(use.name)) is not None:
                raise AdapterLoadFailed(
                    f"this replica cannot serve adapter {use.name!r}: {reason}",
                    remedy="load it again with load_inplace",
                )

    async def generate(
        self,
        request_id: str,
        prompt: Sequence[int] | MediaPrompt,
        params: SamplingParams | PoolingParams,
        adapters: Sequence[AdapterUse] = (),
        admitted: Callable[[Sequence[AdapterRef]], None] | None = None,
    ) -> AsyncIterator[Delta]:
        self._check_here(adapters)
        deltas = super().generate(request_id, prompt, params, adapters, admitted)
        try:
            async for delta in deltas:
                yield delta
        finally:
            await deltas.aclose()  # type: ignore[attr-defined]

    async def add_adapter(
        self,
        name: str,
        path: str,
        *,
        load_inplace: bool = False,
        expected_digest: str | None = None,
        pinned: bool | None = None,
    ) -> AdapterRef:
        """Serve an adapter on every replica, or on none."""
        return await self.catalog.load(name, path, load_inplace, expected_digest, pinned)

    async def remove_adapter(
        self, name: str, *, drain_s: float | None = None, expected_digest: str | None = None
    ) -> Unloaded:
        """Stop serving an adapter on every replica; requests in flight finish."""
        if drain_s is not None:
            raise InvalidField(
                "drain_s is not served with replicas",
                field="drain_s",
                remedy="leave it out; loramux_adapter_users in /metrics tells when it is gone",
            )
        ref = await self.catalog.unload(name, expected_digest)
        return Unloaded(ref or AdapterRef(name, "", "", 0, 0))

    async def pin_adapter(self, name: str, pinned: bool = True) -> AdapterRef:
        """Pin an adapter on every replica, or no longer."""
        return await self.catalog.pin(name, pinned) or AdapterRef(name, "", "", 0, 0)

    async def push_adapter(self, *arguments: Any, **how: Any) -> AdapterRef:
        raise Forbidden(
            "adapters cannot be pushed to replicas, which each read the files themselves",
            remedy="write them where every node can read them, and load that folder",
        )

    def residency(self) -> list[AdapterStatus]:
        raise _of_one_server("/v1/adapters")

    def adapter_events(self) -> AsyncIterator[list[AdapterEvent] | None]:
        raise _of_one_server("/v1/adapters/events")

    # --- what the catalog asks for -------------------------------------------------------------

    async def stage(self, name: str, path: str, replace: bool) -> AdapterRef:
        return await super().stage_adapter(name, path, load_inplace=replace)

    async def discard(self, name: str) -> None:
        super().discard_adapter(name)

    async def publish(self, name: str, digest: str, revision: int) -> None:
        """Serve what was staged. Who has missed something, this stage even, catches up instead."""
        async with self._changes:
            if revision == self.known.revision + 1 and self.staged_digest(name) == digest:
                ref = self.publish_adapter(name)
                self._missing.pop(name, None)
                before = self.known.entries.get(name)
                entry = Entry(name, ref.source, ref, before is not None and before.pinned)
                entries = {**self.known.entries, name: entry}
                self.known = State(revision, entries, self.known.started_s)
                return
            super().discard_adapter(name)
        await self.catch_up()

    async def may_pin(self, name: str) -> None:
        """Raise PinRefused if there are too few places for it here."""
        self._engine.require_store().registry.check_pin(name)

    async def set_pin(self, name: str, pinned: bool, revision: int) -> None:
        async with self._changes:
            if revision == self.known.revision + 1:
                if self.serves(name):
                    await self._set_pin(name, pinned)
                entry = changed(self.known.entries[name], pinned=pinned)
                entries = {**self.known.entries, name: entry}
                self.known = State(revision, entries, self.known.started_s)
                return
        await self.catch_up()

    async def withdraw(self, name: str, revision: int) -> None:
        async with self._changes:
            if revision == self.known.revision + 1:
                if self.serves(name):
                    await super().remove_adapter(name)
                self._missing.pop(name, None)
                entries = {k: entry for k, entry in self.known.entries.items() if k != name}
                self.known = State(revision, entries, self.known.started_s)
                return
        await self.catch_up()

    async def check(self) -> None:
        """Raise EngineStopped if the engine has died; otherwise catch up, if that can be."""
        if self.failure is not None:
            raise EngineStopped(f"the engine has died: {self.failure!r}")
        try:
            await asyncio.wait_for(self.catch_up(), timeout=5.0)
        except (LoramuxError, TimeoutError) as error:
            logger.warning("cannot compare adapters with the catalog: %s", error)


def _of_one_server(path: str) -> Forbidden:
    return Forbidden(
        f"{path} tells of one server, and there are several replicas",
        remedy="/metrics has loramux_adapter_on_device and its like by replica",
    )
