"""What is checked before a request is looked at: the API key and the size of its body.

`/health`, `/version` and `/metrics` need no key: they are for the operator's own tools.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramux.server.access import SCOPE_KEY, Access, Keyring
from loramux.server.encoding import ReplyJSON
from loramux.server.errors import INVALID, error_body

PROTECTED_PREFIXES = ("/v1", "/classify")
PUSH_PREFIX = "/v1/adapters/"


class ApiKeyGate:
    """Requires `Authorization: Bearer <key>` on every path that serves a model, and notes what the key
    may do."""

    def __init__(self, app: ASGIApp, keys: Keyring) -> None:
        self.app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._is_protected(scope):
            access = self._access(scope)
            if access is None:
                await self._refuse(scope, receive, send)
                return
            scope[SCOPE_KEY] = access
        await self.app(scope, receive, send)

    def _is_protected(self, scope: Scope) -> bool:
        path = scope["path"]
        return any(path == prefix or path.startswith(prefix + "/") for prefix in PROTECTED_PREFIXES)

    def _access(self, scope: Scope) -> Access | None:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # Headers are latin-1 on the wire; a key in UTF-8 survives the way back.
        access = self._keys.find(given.strip().encode("latin-1"))
        return access if scheme.lower() == "bearer" else None

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = error_body(
            "the API key is missing or wrong: send Authorization: Bearer <key>",
            "authentication_error",
            code="invalid_api_key",
        )
        reply = ReplyJSON(body, status_code=401, headers={"WWW-Authenticate": "Bearer"})
        await reply(scope, receive, send)


class BodyLimit:
    """Refuses bodies that are too large while they arrive, whatever their header claims: above
    `pushed_bytes` where an adapter is put, above `max_bytes` everywhere else."""

    def __init__(self, app: ASGIApp, max_bytes: int, pushed_bytes: int | None = None) -> None:
        self.app = app
        self._most = (max_bytes, "--max-body-bytes")
        self._most_pushed = (pushed_bytes or max_bytes, "--max-adapter-bytes")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        pushed = scope["method"] == "PUT" and scope["path"].startswith(PUSH_PREFIX)
        most, setting = self._most_pushed if pushed else self._most
        refusal = f"the body is larger than {most} bytes (the server's {setting})"
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > most:
            reply = ReplyJSON(error_body(refusal, INVALID, code="body_too_large"), status_code=413)
            await reply(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise HTTPException(413, refusal)
            return message

        await self.app(scope, counted, send)
