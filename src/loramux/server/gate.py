"""What is checked before a request is looked at: the API key and the size of its body."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramux.server.encoding import ReplyJSON
from loramux.server.errors import INVALID, error_body

PROTECTED_PREFIXES = ("/v1", "/classify")


class ApiKeyGate:
    """Requires `Authorization: Bearer <key>` on every path that serves a model."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self._expected = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._is_protected(scope) and not self._has_key(scope):
            body = error_body(
                "the API key is missing or wrong: send Authorization: Bearer <key>",
                "authentication_error",
                code="invalid_api_key",
            )
            reply = ReplyJSON(body, status_code=401, headers={"WWW-Authenticate": "Bearer"})
            await reply(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_protected(self, scope: Scope) -> bool:
        path = scope["path"]
        return any(path == prefix or path.startswith(prefix + "/") for prefix in PROTECTED_PREFIXES)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # Headers are latin-1 on the wire; a key in UTF-8 survives the way back.
        matches = hmac.compare_digest(given.strip().encode("latin-1"), self._expected)
        return scheme.lower() == "bearer" and matches


class BodyLimit:
    """Refuses bodies above `max_bytes` while they arrive, whatever their header claims."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_bytes:
            reply = ReplyJSON(
                error_body(self._message(), INVALID, code="body_too_large"), status_code=413
            )
            await reply(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise HTTPException(413, self._message())
            return message

        await self.app(scope, counted, send)

    def _message(self) -> str:
        return f"the body is larger than {self._max_bytes} bytes (the server's --max-body-bytes)"
