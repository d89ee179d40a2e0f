"""Which adapters all replicas serve, and how a change reaches all of them or none.

    load:    stage on every replica ─── all read the same ─────▶ revision + 1, publish
                                    └── one refused or differs ─▶ discard; its reason to the caller
    unload:                                                       revision + 1, withdraw
    pin:     may_pin on every replica ─ all have room ──────────▶ revision + 1, set_pin

Every change is a revision. A replica that is at an older one (it has just started, or could not be
reached) asks for the current state and brings itself up to it. A catalog that is new in a running
application knows nothing: it takes the newest state that a replica has.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import Any, Protocol, TypeVar

from loramux.errors import (
    AdapterConflict,
    AdapterExists,
    AdapterNotFound,
    AdapterRejected,
    EngineStopped,
    LoramuxError,
)
from loramux.types import AdapterRef

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Entry:
    """An adapter and where it comes from; `ref` is None until a replica has read it first."""

    name: str
    path: str
    ref: AdapterRef | None = None
    pinned: bool = False

    def is_version(self, expected: str) -> bool:
        """Whether it is the version with this digest, or with these first digits of one."""
        return self.ref is not None and self.ref.digest.startswith(expected.lower())


@dataclass(frozen=True, slots=True)
class State:
    """All entries at one revision. `started_s`: the application's start, seconds since the epoch."""

    revision: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    started_s: int = 0


class Replicas(Protocol):
    async def call(self, method: str, *arguments: Any) -> list[Any]:
        """What each running replica returns or raises (as a value). Those that are lost are left out."""


class Catalog:
    """The one that decides; methods may run concurrently on one event loop."""

    def __init__(self, sources: Sequence[tuple[str, str]], replicas: Replicas) -> None:
        """`sources` are the (name, path) that every replica starts with."""
        entries = {name: Entry(name, path) for name, path in sources}
        self._state = State(0, entries, int(time.time()))
        self._replicas = replicas
        self._settling: asyncio.Task[None] | None = None
        self._changing: set[str] = set()
        self._lock = asyncio.Lock()
        self._failure: LoramuxError | None = None

    async def state(self, known: int = -1) -> State | None:
        """The state, or None for a caller that is at revision `known` already."""
        await self._settled()
        return None if known == self._state.revision else self._state

    async def confirm(self, refs: Sequence[AdapterRef]) -> list[str]:
        """What a starting replica has read. Names of which another one has read other bytes."""
        await self._settled()
        differing = []
        for ref in refs:
            entry = self._state.entries.get(ref.name)
            if entry is not None and entry.ref is None:
                self._state.entries[ref.name] = changed(entry, ref=ref)
            elif entry is not None and entry.ref is not None and entry.ref.digest != ref.digest:
                differing.append(ref.name)
        return differing

    async def load(
        self,
        name: str,
        path: str,
        replace: bool,
        expected: str | None = None,
        pinned: bool | None = None,
    ) -> AdapterRef:
        """Serve the adapter on every replica. Raises AdapterConflict, or what a replica raises, and
        then none serves it."""
        await self._settled()
        self._check_expected(name, expected)
        if pinned:
            _raise_any(await self._replicas.call("may_pin", name))
        if name in self._changing:
            raise AdapterExists(f"{name!r} is being loaded by another call", field="lora_name")
        self._changing.add(name)
        # A caller that leaves does not leave half a change behind.
        return await asyncio.shield(
            asyncio.create_task(self._load(name, path, replace, expected, pinned))
        )

    async def unload(self, name: str, expected: str | None = None) -> AdapterRef | None:
        """Stop serving the adapter everywhere. Raises AdapterNotFound or AdapterConflict."""
        await self._settled()
        async with self._lock:
            if name not in self._state.entries:
                raise AdapterNotFound(f"no adapter {name!r} is served", field="lora_name")
            self._check_expected(name, expected)
            ref = self._state.entries[name].ref
            entries = {key: entry for key, entry in self._state.entries.items() if key != name}
            await asyncio.shield(self._commit(entries, "withdraw", name))
            return ref

    async def pin(self, name: str, pinned: bool) -> AdapterRef | None:
        """Keep the adapter on every replica's device, or no longer. Raises AdapterNotFound or
        PinRefused, and then nothing has changed."""
        await self._settled()
        async with self._lock:
            if (entry := self._state.entries.get(name)) is None:
                raise AdapterNotFound(f"no adapter {name!r} is served", field="lora_name")
            if pinned:
                _raise_any(await self._replicas.call("may_pin", name))
            entries = {**self._state.entries, name: changed(entry, pinned=pinned)}
            await asyncio.shield(self._commit(entries, "set_pin", name, pinned))
            return entry.ref

    def fail(self, error: LoramuxError) -> None:
        """Why a replica could not start; the newest is kept."""
        self._failure = error

    def failure(self) -> LoramuxError | None:
        return self._failure

    async def _load(
        self, name: str, path: str, replace: bool, expected: str | None, pinned: bool | None
    ) -> AdapterRef:
        try:
            results = await self._replicas.call("stage", name, path, replace)
            async with self._lock:
                try:
                    ref = _agreed(name, results)
                    self._check_expected(name, expected)
                except BaseException:
                    await self._replicas.call("discard", name)
                    raise
                before = self._state.entries.get(name)
                entry = Entry(name, path, ref, before is not None and before.pinned)
                entries = {**self._state.entries, name: entry}
                await self._commit(entries, "publish", name, ref.digest)
            if pinned is not None and pinned != entry.pinned:
                await self.pin(name, pinned)
            return ref
        finally:
            self._changing.discard(name)

    async def _commit(self, entries: dict[str, Entry], method: str, *arguments: Any) -> None:
        revision = self._state.revision + 1
        self._state = State(revision, entries, self._state.started_s)
        for result in await self._replicas.call(method, *arguments, revision):
            if isinstance(result, BaseException):  # it will come to the state by itself
                logger.error("a replica could not %s %s: %r", method, arguments[0], result)

    def _check_expected(self, name: str, expected: str | None) -> None:
        entry = self._state.entries.get(name)
        if expected is None or (entry is None and expected == "none"):
            return
        if entry is not None and entry.is_version(expected):
            return
        current = entry.ref.digest if entry is not None and entry.ref is not None else None
        raise AdapterConflict(
            f"the adapter {name!r} has the digest {current}, and {expected!r} was expected",
            current_digest=current,
            remedy="look at what is served now, and decide again",
        )

    async def _settled(self) -> None:
        if self._settling is None:
            self._settling = asyncio.create_task(self._settle())
        await asyncio.shield(self._settling)

    async def _settle(self) -> None:
        states = await self._replicas.call("state")
        newest = max(
            (state for state in states if isinstance(state, State)),
            key=lambda state: state.revision,
            default=self._state,
        )
        if newest.revision >= self._state.revision:
            self._state = newest


def _agreed(name: str, results: Sequence[Any]) -> AdapterRef:
    """The one version that all replicas have read, or the first reason why there is none."""
    if not results:
        raise EngineStopped("no replica is running", remedy="try again in a moment")
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        raise _told(errors[0], len(errors), len(results))
    digests = {ref.digest for ref in results}
    if len(digests) > 1:
        raise AdapterRejected(
            name,
            [f"the {len(results)} replicas read {len(digests)} different versions from its path"],
            remedy="put the same files under this path on every node",
        )
    ref = results[0]
    assert isinstance(ref, AdapterRef)
    return ref


def _raise_any(results: Sequence[Any]) -> None:
    """Raise the first error that a replica has answered with."""
    for result in results:
        if isinstance(result, BaseException):
            raise result


def _told(error: BaseException, num_errors: int, num_replicas: int) -> BaseException:
    """The error, saying how many replicas it is from if the others had none."""
    if isinstance(error, LoramuxError) and num_errors < num_replicas:
        error.message += f" (on {num_errors} of {num_replicas} replicas, so it is loaded on none)"
    return error
