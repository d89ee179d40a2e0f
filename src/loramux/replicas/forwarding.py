"""One HTTP request as a message between processes, and an ASGI app that answers it with others.

Messages are ASGI's own. Those that are ready travel together; the start of a response waits for its
first bytes, so whoever has seen a start knows that the answer has begun.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message, Scope

from loramux.errors import InvalidField
from loramux.server.adapter_paths import check_name

POOLING_PATHS = {"/v1/embeddings", "/v1/classify", "/classify"}
GENERATION_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", *POOLING_PATHS})
MAX_MEMBERS = 32  # of a composition, as far as routing looks
SEPARATOR = "+"  # no name may contain it
BASE_KEY = "+"  # of requests without adapters, which Ray would not keep apart with an empty one


class Forwarded(NamedTuple):
    """What a replica needs of a request. Headers are ASGI's pairs."""

    method: str
    path: str
    query_string: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    members: tuple[str, ...]

    @property
    def may_be_repeated(self) -> bool:
        """Whether a second replica may be asked: nothing but the answer is lost with the first."""
        return self.method in ("GET", "HEAD", "OPTIONS") or self.path in GENERATION_PATHS

    def scope(self) -> Scope:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query_string,
            "headers": self.headers,
            "client": None,
            "server": None,
            "state": {},
        }


def adapters_of(path: str, body: bytes, base_names: Collection[str]) -> tuple[str, ...]:
    """Names of the adapters that a request asks for, sorted; empty for the base, and for anything
    that a replica will refuse."""
    if path not in GENERATION_PATHS:
        return ()
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(content, dict):
        return ()
    model, items = content.get("model"), content.get("lora")
    names: list[Any] = [model] if isinstance(model, str) and model not in base_names else []
    for item in items[:MAX_MEMBERS] if isinstance(items, list) else ():
        names.append(item.get("name") if isinstance(item, dict) else item)
    return tuple(sorted({name for name in names if isinstance(name, str) and _is_name(name)}))


def _is_name(name: str) -> bool:
    try:
        return bool(check_name(name))
    except InvalidField:
        return False


def key_of_members(members: tuple[str, ...]) -> str:
    """The names as one text, for Ray's multiplexed model id."""
    return SEPARATOR.join(members) or BASE_KEY


def members_of_key(key: str) -> tuple[str, ...]:
    return tuple(name for name in key.split(SEPARATOR) if name)


async def answer(app: ASGIApp, request: Forwarded) -> AsyncIterator[list[Message]]:
    """Run `app` on the request and yield what it sends. Leaving early tells it of a disconnect.

    Raises what the app raises after, or without, an answer.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    incoming: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> Message:
        if incoming:
            return incoming.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":  # Ray's pickles: plain tuples
            message = {**message, "headers": [tuple(pair) for pair in message["headers"]]}
        await sent.put(message)

    async def run() -> None:
        try:
            await app(request.scope(), receive, send)
        finally:
            await sent.put(None)

    task = asyncio.create_task(run())
    try:
        while (batch := await _next_batch(sent)) is not None:
            yield batch
        await task
    finally:
        gone.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def unless_dead(
    batches: AsyncIterator[list[Message]], is_dead: Callable[[], bool]
) -> AsyncIterator[list[Message]]:
    """`batches`, unless what makes them is dead before the first: then nothing, for ever.

    Its process is about to end. Whoever waits hears of that, and asks another one.
    """
    begun = False
    async for batch in batches:
        if not begun and is_dead():
            await asyncio.Event().wait()
        begun = True
        yield batch


async def _next_batch(sent: asyncio.Queue[Message | None]) -> list[Message] | None:
    """The messages that are ready, at least one that holds a piece of a body; None at the end."""
    batch: list[Any] = []
    while not batch or (sent.empty() and batch[-1]["type"] == "http.response.start"):
        if (message := await sent.get()) is None:
            return batch or None
        batch.append(message)
    while not sent.empty():
        if (message := sent.get_nowait()) is None:
            sent.put_nowait(None)
            break
        batch.append(message)
    return batch
