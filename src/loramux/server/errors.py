"""The one place where an exception becomes an HTTP status and a body in OpenAI's shape."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from loramux import errors
from loramux.server.disconnect import ClientGone
from loramux.server.encoding import ReplyJSON

logger = logging.getLogger(__name__)

INVALID = "invalid_request_error"
SERVER = "server_error"
MAX_LISTED_FAULTS = 5


@dataclass(frozen=True, slots=True)
class Row:
    """What the client sees of one class of error; `type` and `code` are OpenAI's fields."""

    status: int
    type: str
    code: str | None = None


# Every class of the tree in `loramux.errors` has its own row (a test walks the tree).
TABLE: Mapping[type[errors.LoramuxError], Row] = {
    errors.LoramuxError: Row(500, SERVER, "internal_error"),
    errors.RequestError: Row(400, INVALID, "invalid_request"),
    errors.InvalidField: Row(400, INVALID, "invalid_value"),
    errors.PromptTooLong: Row(400, INVALID, "context_length_exceeded"),
    errors.UnknownModel: Row(404, INVALID, "model_not_found"),
    errors.AdapterNotFound: Row(404, INVALID, "adapter_not_found"),
    errors.AdapterExists: Row(409, INVALID, "adapter_exists"),
    errors.AdapterConflict: Row(409, INVALID, "adapter_conflict"),
    errors.PinRefused: Row(409, INVALID, "pin_refused"),
    errors.AdapterRejected: Row(400, INVALID, "adapter_rejected"),
    errors.BadMedia: Row(400, INVALID, "invalid_media"),
    errors.MediaUnavailable: Row(400, INVALID, "media_unavailable"),
    errors.Forbidden: Row(403, "permission_error", "forbidden"),
    errors.ConfigError: Row(500, SERVER, "configuration_error"),
    errors.UnsupportedModel: Row(500, SERVER, "unsupported_model"),
    errors.EngineError: Row(500, SERVER, "engine_error"),
    errors.EngineStopped: Row(503, SERVER, "engine_stopped"),
    errors.ReplicaLost: Row(503, SERVER, "engine_stopped"),
    errors.AdapterLoadFailed: Row(500, SERVER, "adapter_load_failed"),
    errors.AdapterUnloaded: Row(503, SERVER, "adapter_unloaded"),
    errors.SourceUnavailable: Row(503, SERVER, "adapter_source_unavailable"),
    errors.Overloaded: Row(429, "rate_limit_error", "overloaded"),
    errors.QuotaReached: Row(429, "rate_limit_error", "rate_limit_exceeded"),
}


def row_of(error: errors.LoramuxError) -> Row:
    """The row of the nearest listed ancestor."""
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


def error_body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: Exception) -> dict[str, Any]:
    """The body for any exception; one that loramux did not raise on purpose keeps its secrets."""
    if isinstance(error, errors.LoramuxError):
        row = row_of(error)
        body = error_body(str(error), row.type, param=error.field, code=row.code)
        if isinstance(error, errors.AdapterConflict):
            body["error"]["current_digest"] = error.current_digest
        return body
    return error_body("internal error; the server's log has the details", SERVER)


def response_of(error: Exception) -> Response:
    if not isinstance(error, errors.LoramuxError):
        return ReplyJSON(body_of(error), status_code=500)
    headers: dict[str, str] = {}
    if isinstance(error, errors.Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return ReplyJSON(body_of(error), status_code=row_of(error).status, headers=headers)


def _describe(fault: Mapping[str, Any]) -> tuple[str, str | None]:
    """One pydantic fault as (message, dotted path of the field)."""
    path = ".".join(str(part) for part in fault["loc"][1:]) or None
    kind = fault["type"]
    cause = fault.get("ctx", {}).get("error")
    if kind == "extra_forbidden":
        return f"unknown field {path!r}", path
    if kind == "json_invalid":
        return f"the body is not valid JSON: {cause} at character {path}", None
    if kind == "missing":
        return (f"field {path!r} is required" if path else "the body must be a JSON object"), path
    if isinstance(cause, errors.LoramuxError):
        return _describe_own(cause, path)
    return f"{path or 'body'}: {fault['msg']}", path


def _describe_own(cause: errors.LoramuxError, path: str | None) -> tuple[str, str | None]:
    """An error of ours that a validator raised at `path`; the message names the place."""
    message = str(cause)
    if path is None or cause.field is None:
        return message, path or cause.field
    where = path if path.split(".")[0] == cause.field else f"{path}.{cause.field}"
    return (message if message.startswith(where) else f"{where}: {message}"), where


def describe_faults(faults: Iterable[Mapping[str, Any]]) -> tuple[str, str | None]:
    """All faults in one message, and the field of the first."""
    described = [_describe(fault) for fault in faults]
    listed = [message for message, _ in described[:MAX_LISTED_FAULTS]]
    if len(described) > MAX_LISTED_FAULTS:
        listed.append(f"and {len(described) - MAX_LISTED_FAULTS} more")
    return "; ".join(listed), described[0][1]


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and "+json" in kind)


async def _on_loramux_error(request: Request, error: Exception) -> Response:
    return response_of(error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = error.errors()
    if not _is_json(request) and any(fault["loc"][0] == "body" for fault in faults):
        message = "the Content-Type must be application/json"
        return ReplyJSON(error_body(message, INVALID, code="content_type"), status_code=415)
    message, param = describe_faults(faults)
    return ReplyJSON(error_body(message, INVALID, param=param, code="invalid_value"), 400)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message, code = str(error.detail), None
    if error.status_code == 404:
        message, code = f"there is no route {request.url.path}", "unknown_url"
    elif error.status_code == 405:
        message = f"{request.method} is not allowed on {request.url.path}"
        code = "method_not_allowed"
    elif error.status_code == 413:
        code = "body_too_large"
    elif error.status_code == 400:
        message = "the body is not valid JSON (send UTF-8, not too deeply nested)"
    kind = INVALID if error.status_code < 500 else SERVER
    return ReplyJSON(
        error_body(message, kind, code=code), status_code=error.status_code, headers=error.headers
    )


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; 499 is what proxies log for this


async def _on_bug(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return response_of(error)


def install_handlers(app: FastAPI) -> None:
    app.add_exception_handler(errors.LoramuxError, _on_loramux_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_exception_handler(Exception, _on_bug)
