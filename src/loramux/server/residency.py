"""`/v1/adapters`: which versions there are, where each one is, and a stream of what happens to them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from loramux.errors import AdapterNotFound
from loramux.server.access import Access, Caller
from loramux.server.encoding import ReplyJSON
from loramux.server.sse import EventStream, event
from loramux.server.state import ServerState, State
from loramux.status import AdapterEvent, AdapterStatus

router = APIRouter()

QUIET_S = 15  # empty batches, of which there is one a second, until a sign of life is sent


def row(state: ServerState, status: AdapterStatus, access: Access) -> dict[str, Any]:
    """One version under one name. Times are seconds since the epoch."""
    ref = status.ref
    shown = {
        "name": ref.name,
        "digest": ref.digest,
        "state": status.state,
        "place": status.place,
        "pinned": status.pinned,
        "users": status.users,
        "bytes": ref.num_bytes,
        "max_r": ref.max_r,
        "labels": list(ref.labels),
        "loaded_at": status.loaded_at_s,
        "load_seconds": status.load_s,
        "last_used": status.last_used_s,
        "limits": state.quotas.limits_of(ref.name).model_dump(),
    }
    return {**shown, "source": ref.source} if access.is_admin else shown


def rows(state: ServerState, access: Access) -> list[dict[str, Any]]:
    """All that the caller may see; versions that drain come last."""
    statuses = state.engine.residency()
    return [row(state, status, access) for status in statuses if access.may_see(status.ref.name)]


@router.get("/v1/adapters")
async def list_adapters(state: State, access: Caller) -> Response:
    """One entry a served name, and one for each version that drains."""
    return ReplyJSON({"object": "list", "data": rows(state, access)})


@router.get("/v1/adapters/events")
async def stream_events(state: State, access: Caller) -> Response:
    """What there is, then each change as it happens."""
    changes = state.engine.adapter_events()
    await anext(changes)  # it hears all from now on, and the list that is sent first has the rest
    return EventStream(_events(state, access, changes), changes.aclose)  # type: ignore[attr-defined]


@router.get("/v1/adapters/{name:path}")
async def get_adapter(name: str, state: State, access: Caller) -> Response:
    """The version that is served under this name, or else the one that drains."""
    found = [item for item in rows(state, access) if item["name"] == name]
    if not found:
        raise AdapterNotFound(
            f"there is no adapter {name!r}", remedy="GET /v1/adapters lists what there is"
        )
    return ReplyJSON(found[0])


async def _events(
    state: ServerState, access: Access, changes: AsyncIterator[list[AdapterEvent] | None]
) -> AsyncIterator[bytes]:
    yield event({"event": "snapshot", "data": rows(state, access)})
    quiet = 0
    async for batch in changes:
        if batch is None:
            yield event(
                {"event": "dropped", "message": "too slow: events were lost; connect again"}
            )
            return
        seen = [change for change in batch if access.may_see(change.name)]
        for change in seen:
            yield event(_shown(change))
        quiet = 0 if seen else quiet + 1
        if state.draining:
            return
        if quiet >= QUIET_S:
            quiet = 0
            yield b": still here\n\n"


def _shown(change: AdapterEvent) -> dict[str, Any]:
    told = {key: value for key, value in asdict(change).items() if value is not None}
    return {"event": told.pop("kind"), "time": told.pop("time_s"), **told}
