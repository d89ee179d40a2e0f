"""Which model and adapters a request means, and how the answer says so."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import quote

from loramux.engine.default_adapters import MARK, choose_adapters, is_default
from loramux.errors import InvalidField, QuotaReached, UnknownModel
from loramux.server.access import Access
from loramux.server.generation import Generation, Version
from loramux.server.pooling_protocol import PoolingBody
from loramux.server.protocol import GenerationBody
from loramux.server.state import ServerState
from loramux.types import AdapterUse

ADAPTERS_HEADER = "x-loramux-adapters"
AFFINITY_HEADER = "x-loramux-affinity"
NOT_INVOKED_HEADER = "x-loramux-not-invoked"
DIGEST_LENGTH = 12


async def select_adapters(
    state: ServerState, body: GenerationBody | PoolingBody, modalities: Collection[str] = ()
) -> tuple[AdapterUse, ...]:
    """`model` and `lora` as the engine wants them, or the defaults of the `modalities` of a request that
    names no adapter.

    `model` is the base model's name or an adapter's; `lora` goes with the base model only.
    Names that are not known are looked up and loaded where the operator allowed it. Raises UnknownModel,
    InvalidField, or what the load raises.
    """
    _check_limits(state, body)
    await _look_up(state, body)
    served = _served(state)
    listed = body.adapters
    if body.model in state.engine.config.model_names:
        for use in listed or ():
            _check_served(state, use.name, served, field="lora")
        return choose_adapters(state.engine.config.lora, modalities, listed)
    _check_served(state, body.model, served, field="model")
    if listed is not None:
        raise InvalidField(
            f"model {body.model!r} is an adapter, and lora lists adapters too",
            field="lora",
            remedy=f"choose one: add {body.model!r} to lora and set model to "
            f"{state.engine.config.model_names[0]!r}, or leave lora out",
        )
    return (AdapterUse(body.model),)


def _check_limits(state: ServerState, body: GenerationBody | PoolingBody) -> None:
    """Raise QuotaReached where a request would be refused anyway, before it is looked at."""
    model = [] if body.model in state.engine.config.model_names else [body.model]
    listed = [use.name for use in body.adapters or ()]
    lora = state.engine.config.lora
    if body.adapters is None and not model and lora is not None and lora.default_mm_loras:
        return  # it may get the defaults of its media
    served = _served(state)
    names = [name for name in (*model, *listed) if name in served]
    if len(names) < len(model) + len(listed):
        return  # what is not served yet has used nothing
    try:
        state.quotas.check(names)
    except QuotaReached as error:
        state.metrics.refused(error)
        raise


def _served(state: ServerState) -> set[str]:
    """Names that a request may give."""
    names = {status.ref.name for status in state.engine.adapters()}
    return {name for name in names if not is_default(name)}


async def _look_up(state: ServerState, body: GenerationBody | PoolingBody) -> None:
    """Load the adapters of a request that are not served yet, several at once."""
    lora = state.engine.config.lora
    if lora is None or not lora.resolves:
        return
    if body.model in state.engine.config.model_names:
        named = [use.name for use in body.adapters or ()]
    else:
        named = [body.model] if body.adapters is None else []
    served = _served(state)
    missing = dict.fromkeys(name for name in named if name not in served)
    await asyncio.gather(*(state.engine.resolve_adapter(name) for name in missing))


def _check_served(state: ServerState, name: str, served: set[str], *, field: str) -> None:
    if name in served:
        return
    if state.engine.config.lora is None:
        remedy = "the server runs without adapters; start it with --enable-lora"
    else:
        remedy = "GET /v1/models lists what is served"
    what = "model" if field == "model" else "adapter"
    raise UnknownModel(f"the {what} {name!r} does not exist", field=field, remedy=remedy)


def check_use(access: Access, state: ServerState, body: GenerationBody | PoolingBody) -> None:
    """Raise Forbidden for an adapter that the caller's key may not use, known or not."""
    if body.model not in state.engine.config.model_names:
        access.check_use(body.model, field="model")
    for use in body.adapters or ():
        access.check_use(use.name, field="lora")


def adapter_headers(generation: Generation) -> dict[str, str]:
    """`name@digest` of each version that answers, percent-encoded, of those that were not invoked, and
    what a router needs to send the next such request to the same server; nothing for the base model."""
    if not generation.versions:
        return {}
    names = sorted({_quoted(name) for name, _ in generation.versions})
    headers = {ADAPTERS_HEADER: _listed(generation.versions), AFFINITY_HEADER: "+".join(names)}
    if generation.not_invoked:
        headers[NOT_INVOKED_HEADER] = _listed(generation.not_invoked)
    return headers


def _listed(versions: Sequence[Version]) -> str:
    return ",".join(f"{_quoted(name)}@{ref.digest[:DIGEST_LENGTH]}" for name, ref in versions)


def _quoted(name: str) -> str:
    return quote(name, safe="._-:@/")


def default_adapters(versions: Sequence[Version]) -> list[dict[str, Any]]:
    """Which adapters were applied though the request named none, for the answer's body."""
    return [
        {"name": name, "modality": name.removeprefix(MARK), "digest": ref.digest}
        for name, ref in versions
        if is_default(name)
    ]


def idle_adapters(generation: Generation) -> dict[str, Any]:
    """What an answer's body says of activated LoRAs whose invocation a prompt lacks; mostly nothing."""
    idle = [{"name": name, "digest": ref.digest} for name, ref in generation.not_invoked]
    return {"not_invoked": idle} if idle else {}
