"""`GET /v1/models`: the base model under each of its names, and every adapter."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from loramux.engine.default_adapters import is_default
from loramux.errors import UnknownModel
from loramux.server.access import Access, Caller
from loramux.server.encoding import ReplyJSON
from loramux.server.state import ServerState, State

router = APIRouter()


def _cards(state: ServerState, access: Access) -> list[dict[str, Any]]:
    config = state.engine.config
    common = {"object": "model", "created": state.started_s, "owned_by": "loramux"}
    bases = [
        {
            "id": name,
            **common,
            "root": config.model,
            "parent": None,
            "max_model_len": state.context_length,
        }
        for name in config.model_names
    ]
    adapters = [
        {
            "id": status.ref.name,
            **common,
            "root": status.ref.source,
            "parent": config.model_names[0],
            "max_model_len": state.context_length,
            "digest": status.ref.digest,
        }
        for status in state.engine.adapters()
        if not is_default(status.ref.name)  # nobody can ask for these
        and access.may_use(status.ref.name)
    ]
    return bases + adapters


@router.get("/v1/models")
async def list_models(state: State, access: Caller) -> Response:
    """The names that the caller may put into `model`."""
    return ReplyJSON({"object": "list", "data": _cards(state, access)})


@router.get("/v1/models/{model_id:path}")
async def get_model(model_id: str, state: State, access: Caller) -> Response:
    """One of them; the name may contain slashes."""
    for card in _cards(state, access):
        if card["id"] == model_id:
            return ReplyJSON(card)
    raise UnknownModel(
        f"the model {model_id!r} does not exist",
        field="model",
        remedy="GET /v1/models lists what is served",
    )
