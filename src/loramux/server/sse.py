"""Server-sent events: the response that carries them, and how a stream ends."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loramux.errors import LoramuxError
from loramux.server.disconnect import ClientGone, unless_gone
from loramux.server.encoding import encode
from loramux.server.errors import body_of

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


def event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + encode(content) + b"\n\n"


class EventStream(Response):
    """Sends `events` as they come; `close` runs at the end, however it comes.

    The client's disconnect is watched for all the time, so that a request that waits in the queue
    is cancelled before it has written anything.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], Awaitable[None]],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.events = events
        self.close = close
        self.status_code = 200
        self.background = None
        # X-Accel-Buffering: proxies that buffer would turn the stream into one late answer.
        # Response.body stays unset, as in StreamingResponse: the length is not known.
        self.init_headers(
            {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(send))
        except (ClientGone, OSError):
            pass
        finally:
            await self.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self.events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def guarded(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """`events`, then the end mark. An error on the way becomes an event: the status is sent."""
    try:
        async for item in events:
            yield item
    except Exception as error:
        if not isinstance(error, LoramuxError):
            logger.exception("a stream failed")
        yield event(body_of(error))
    yield DONE
