"""The ASGI app before the replicas: checks key and size, reads the body, forwards, repeats.

A request whose replica is lost goes to another one as long as the client has seen nothing of an
answer. What has begun ends with an error event, as it does when a single server's engine dies.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, Protocol

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from loramux.config import ServerConfig
from loramux.errors import EngineStopped, ReplicaLost
from loramux.replicas.forwarding import Forwarded, adapters_of
from loramux.server.access import Keyring
from loramux.server.disconnect import ClientGone, unless_gone
from loramux.server.errors import body_of, install_handlers, response_of
from loramux.server.gate import ApiKeyGate, BodyLimit
from loramux.server.sse import DONE, event

logger = logging.getLogger(__name__)

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
MAX_ATTEMPTS = 3  # a request that kills what answers it shall not kill a fleet
HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"upgrade"})


class Ask(Protocol):
    """Sends a request to a replica of somebody's choice and yields what it answers.

    Raises ReplicaLost when that replica went, or another LoramuxError.
    """

    def __call__(self, request: Forwarded) -> AsyncIterator[list[Message]]: ...


def create_front(
    ask: Ask,
    config: ServerConfig,
    base_names: Collection[str],
    metrics: Callable[[], Any],
) -> FastAPI:
    """The application. `metrics()` is awaited for the text of `/metrics`."""
    app = FastAPI(title="loramux", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        text, kind = await metrics()
        return Response(text, headers={"Content-Type": kind})

    @app.api_route("/{path:path}", methods=METHODS)
    async def forward(request: Request) -> Response:
        return await _forward(ask, request, base_names)

    install_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=config.body_limit(None))
    if keys := Keyring.of(config):
        app.add_middleware(ApiKeyGate, keys=keys)
    return app


async def _forward(ask: Ask, request: Request, base_names: Collection[str]) -> Response:
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ClientGone from None
    path = request.scope["path"]
    headers = [(k, v) for k, v in request.scope["headers"] if k not in HOP_BY_HOP]
    members = adapters_of(path, body, base_names)
    query = request.scope["query_string"]
    return _Passed(ask, Forwarded(request.method, path, query, headers, body, members))


class _Passed(Response):
    """What a replica answers, passed on as it comes."""

    def __init__(self, ask: Ask, request: Forwarded) -> None:
        self._ask = ask
        self._request = request
        self.status_code = 200  # until the replica has said
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        passing = _Passing(send)
        try:
            await unless_gone(receive, self._pass_on(passing))
        except (ClientGone, OSError):
            pass
        except Exception as error:
            if not isinstance(error, EngineStopped):
                logger.exception("a request could not be forwarded")
            await passing.fail(error, scope, receive)

    async def _pass_on(self, passing: _Passing) -> None:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            answer = self._ask(self._request)
            try:
                async for batch in answer:
                    await passing.pass_on(batch)
                return
            except ReplicaLost as error:
                last = attempt == MAX_ATTEMPTS or not self._request.may_be_repeated
                if passing.started or last:
                    raise
                logger.warning("%s; asking another one", error)
            finally:
                await answer.aclose()  # type: ignore[attr-defined]


class _Passing:
    """How far an answer has come on its way to the client."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_stream = False
        self.started = False

    async def pass_on(self, batch: list[Message]) -> None:
        for message in batch:
            if message["type"] == "http.response.start":
                self.started = True
                kind = Headers(raw=message["headers"]).get("content-type", "")
                self._is_stream = kind.startswith("text/event-stream")
            await self._send(message)

    async def fail(self, error: Exception, scope: Scope, receive: Receive) -> None:
        """End the answer with an error: as a response, or as the stream's last event."""
        if not self.started:
            await response_of(error)(scope, receive, self._send)
        elif self._is_stream:
            last = event(body_of(error)) + DONE
            await self._send({"type": "http.response.body", "body": last, "more_body": False})
        else:
            raise error  # the connection closes before the promised length
