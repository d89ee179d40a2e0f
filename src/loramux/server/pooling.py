"""What the endpoints that generate nothing share: inputs run concurrently, answers come together."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Request
from starlette.responses import Response

from loramux.errors import EngineError, InvalidField, PromptTooLong
from loramux.server.access import Access
from loramux.server.disconnect import unless_gone
from loramux.server.encoding import encode
from loramux.server.generation import Generation, collect
from loramux.server.pooling_protocol import PoolingBody
from loramux.server.selection import adapter_headers, check_use, select_adapters
from loramux.server.state import ServerState
from loramux.types import AdapterUse, PoolingOutput, PoolingParams


async def pool(
    body: PoolingBody,
    params: PoolingParams,
    request: Request,
    state: ServerState,
    access: Access,
    prefix: str,
    item: Callable[[int, PoolingOutput], dict[str, Any]],
) -> Response:
    """The list of what `item` makes of each input's number and values. Raises LoramuxError."""
    check_use(access, state, body)
    adapters = await select_adapters(state, body)
    created_s = int(time.time())
    with state.engine.hold(adapters) as hold:
        prompts = await _tokenize(state, body, hold.uses)
        _check_lengths(prompts, state.context_length)
        generation = Generation(state, prompts, params, hold)
        choices, usage = await unless_gone(request.receive, collect(generation, prompts, 1))
    outputs = [choice.pooled for choice in choices]
    if None in outputs:
        raise EngineError("an input was not answered")
    items = (item(index, pooled) for index, pooled in enumerate(outputs) if pooled is not None)
    head = {
        "id": f"{prefix}-{body.request_id or uuid.uuid4().hex}",
        "object": "list",
        "created": created_s,
        "model": body.model,
        "usage": usage.as_reply(),
    }
    parts = [part async for part in _encoded(items)]
    content = encode(head)[:-1] + b',"data":[' + b",".join(parts) + b"]}"
    headers = adapter_headers(generation)
    return Response(content, headers=headers, media_type="application/json")


async def _tokenize(
    state: ServerState, body: PoolingBody, adapters: Sequence[AdapterUse]
) -> list[list[int]]:
    special = body.add_special_tokens is not False

    async def one(text: str | list[int]) -> list[int]:
        if isinstance(text, str):
            return await state.engine.tokenize(text, adapters, add_special_tokens=special)
        return text

    return list(await asyncio.gather(*(one(text) for text in body.input)))


def _check_lengths(prompts: list[list[int]], limit: int) -> None:
    for prompt in prompts:
        if not prompt:
            raise InvalidField("input has no tokens", field="input")
        if len(prompt) > limit:
            raise PromptTooLong(
                f"input has {len(prompt)} tokens and the context is {limit}",
                field="input",
                remedy=f"send at most {limit} tokens",
            )


async def _encoded(items: Any) -> AsyncIterator[bytes]:
    """One after the other, so that thousands of numbers hold up nobody else."""
    for item in items:
        yield encode(item)
        await asyncio.sleep(0)
