"""Loading and unloading adapters over HTTP: vLLM's two routes and bodies.

Off unless the operator allowed it, since whoever may load an adapter decides what is answered.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from loramux.errors import Forbidden
from loramux.server.adapter_paths import check_name, resolve_path
from loramux.server.protocol import Body
from loramux.server.state import ServerState, State

router = APIRouter()


class LoadAdapterRequest(Body):
    """`lora_path` is a folder under `lora_root`, absolute or relative to it."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    """Replace an adapter of this name; requests in flight finish on the old version."""


class UnloadAdapterRequest(Body):
    lora_name: str
    lora_int_id: int | None = None
    """Accepted for vLLM's clients; the name alone decides."""


def _require_allowed(state: ServerState) -> str:
    """The root that adapters may come from, or Forbidden."""
    config = state.config
    if not config.allow_runtime_lora_updating or config.lora_root is None:
        raise Forbidden(
            "adapters cannot be changed on this server",
            remedy="start it with --allow-runtime-lora-updating and --lora-root",
        )
    if state.engine.config.lora is None:
        raise Forbidden("this server runs without adapters", remedy="start it with --enable-lora")
    return config.lora_root


@router.post("/v1/load_lora_adapter")
async def load_adapter(body: LoadAdapterRequest, state: State) -> Response:
    """Answers when the adapter is checked, read and ready. A second load of the name meanwhile is
    AdapterExists, which the engine's registry sees to."""
    root = _require_allowed(state)
    name = check_name(body.lora_name)
    path = await asyncio.to_thread(resolve_path, body.lora_path, root)
    await state.engine.add_adapter(name, path, load_inplace=body.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(body: UnloadAdapterRequest, state: State) -> Response:
    """Answers at once; requests in flight finish on the adapter."""
    _require_allowed(state)
    name = check_name(body.lora_name)
    await state.engine.remove_adapter(name)
    state.metrics.prune()
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")
