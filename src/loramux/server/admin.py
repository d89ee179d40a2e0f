"""Loading, unloading and pinning adapters over HTTP: vLLM's two routes and bodies, with more fields.

Off unless the operator allowed it, since whoever may load an adapter decides what is answered. Where
there are API keys, only an admin's may.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from loramux.errors import Forbidden
from loramux.server.access import Access, Caller
from loramux.server.adapter_paths import check_name, resolve_path
from loramux.server.protocol import Body
from loramux.server.state import ServerState, State
from loramux.types import AdapterRef

router = APIRouter()

DIGEST_HEADER = "x-loramux-digest"
DIGEST_PATTERN = "^(none|[0-9A-Fa-f]{12,64})$"
MAX_DRAIN_S = 3600


ExpectedDigest = Annotated[str, Field(pattern=DIGEST_PATTERN)]


class LoadAdapterRequest(Body):
    """`lora_path` is a folder under `lora_root`, absolute or relative to it."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    """Replace an adapter of this name; requests in flight finish on the old version."""

    expected_digest: ExpectedDigest | None = None
    """Load only if this version is served now (its digest, or the first 12 digits and more), or with
    `none` only if there is none of this name."""

    pinned: bool | None = None
    """Keep it in host memory and on the device, or no longer; null leaves that as it is."""


class UnloadAdapterRequest(Body):
    lora_name: str
    lora_int_id: int | None = None
    """Accepted for vLLM's clients; the name alone decides."""

    drain_s: float | None = Field(default=None, ge=0, le=MAX_DRAIN_S)
    """Answer when its requests have finished and its memory is free; after so many seconds those that
    are left end with an error. Null: answer at once, and let them finish."""

    expected_digest: ExpectedDigest | None = None
    """Unload only if this version is served now."""


class PinRequest(Body):
    lora_name: str


def require_changes(state: ServerState, access: Access) -> None:
    """Raise Forbidden unless adapters can be changed here, and by this caller."""
    access.check_admin()
    config = state.config
    if not (config.allow_runtime_lora_updating or config.allow_adapter_push):
        raise Forbidden(
            "adapters cannot be changed on this server",
            remedy="start it with --allow-runtime-lora-updating and --lora-root",
        )
    if state.engine.config.lora is None:
        raise Forbidden("this server runs without adapters", remedy="start it with --enable-lora")


def _require_root(state: ServerState, access: Access) -> str:
    """The root that adapters may come from, or Forbidden."""
    require_changes(state, access)
    root = state.config.lora_root
    if not state.config.allow_runtime_lora_updating or root is None:
        raise Forbidden(
            "adapters cannot be loaded from folders on this server",
            remedy="start it with --allow-runtime-lora-updating and --lora-root",
        )
    return root


def digest_header(ref: AdapterRef) -> dict[str, str]:
    return {DIGEST_HEADER: ref.digest}


@router.post("/v1/load_lora_adapter")
async def load_adapter(body: LoadAdapterRequest, state: State, access: Caller) -> Response:
    """Answers when the adapter is checked, read and ready. A second load of the name meanwhile is
    AdapterExists, which the engine's registry sees to."""
    root = _require_root(state, access)
    name = check_name(body.lora_name)
    path = await asyncio.to_thread(resolve_path, body.lora_path, root)
    ref = await state.engine.add_adapter(
        name,
        path,
        load_inplace=body.load_inplace,
        expected_digest=body.expected_digest,
        pinned=body.pinned,
    )
    said = f"Success: LoRA adapter '{name}' added successfully."
    return PlainTextResponse(said, headers=digest_header(ref))


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(body: UnloadAdapterRequest, state: State, access: Caller) -> Response:
    """Answers at once, or with `drain_s` when the adapter is gone."""
    require_changes(state, access)
    name = check_name(body.lora_name)
    done = await state.engine.remove_adapter(
        name, drain_s=body.drain_s, expected_digest=body.expected_digest
    )
    state.metrics.prune()
    said = f"Success: LoRA adapter '{name}' removed successfully."
    if done.ended:
        said += f" {done.ended} of its requests were ended after {body.drain_s:g} s."
    if body.drain_s is not None and not done.freed:
        said += " The same version is still in use, so its memory is too."
    return PlainTextResponse(said, headers=digest_header(done.ref))


@router.post("/v1/pin_lora_adapter")
async def pin_adapter(body: PinRequest, state: State, access: Caller) -> Response:
    """Keep the adapter in host memory and on the device, whatever version the name has."""
    return await _set_pin(body, state, access, True)


@router.post("/v1/unpin_lora_adapter")
async def unpin_adapter(body: PinRequest, state: State, access: Caller) -> Response:
    """Let the adapter come and go as it is used."""
    return await _set_pin(body, state, access, False)


async def _set_pin(body: PinRequest, state: ServerState, access: Access, pinned: bool) -> Response:
    require_changes(state, access)
    name = check_name(body.lora_name)
    ref = await state.engine.pin_adapter(name, pinned)
    said = f"Success: LoRA adapter '{name}' {'pinned' if pinned else 'unpinned'}."
    return PlainTextResponse(said, headers=digest_header(ref))
