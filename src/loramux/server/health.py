"""`/health`, `/version` and `/metrics`: for operators and their tools, without the API key."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from loramux.errors import EngineStopped
from loramux.server.encoding import ReplyJSON
from loramux.server.state import State

router = APIRouter()


@router.get("/health")
async def health(state: State) -> Response:
    """200 while requests are served; 503 when the engine has died or the process is stopping."""
    if state.engine.failure is not None:
        raise EngineStopped("the engine has died; the server's log has the reason")
    if state.draining:
        raise EngineStopped("the server is shutting down")
    return ReplyJSON({"status": "ok"})


@router.get("/version")
async def show_version() -> Response:
    try:
        number = version("loramux")
    except PackageNotFoundError:  # run from a source tree that is not installed
        number = "unknown"
    return ReplyJSON({"version": number})


@router.get("/metrics")
async def metrics(state: State) -> Response:
    return Response(state.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})
