"""`POST /v1/completions`."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loramux.engine.hold import Hold
from loramux.server.access import Caller
from loramux.server.disconnect import unless_gone
from loramux.server.encoding import ReplyJSON
from loramux.server.generation import Choice, Generation, Usage, collect, has_news
from loramux.server.logprobs import Decode, completion_logprobs
from loramux.server.protocol import CompletionRequest
from loramux.server.sampling import check_room, completion_params
from loramux.server.selection import (
    adapter_headers,
    check_use,
    idle_adapters,
    select_adapters,
)
from loramux.server.sse import EventStream, event, guarded
from loramux.server.state import ServerState, State
from loramux.types import AdapterUse

router = APIRouter()


@dataclass(slots=True)
class Reply:
    """What every event of one answer repeats, and how its choices look."""

    state: ServerState
    body: CompletionRequest
    prompts: list[list[int]]
    n: int
    decode: Decode
    id: str = ""
    created_s: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"cmpl-{self.body.request_id or uuid.uuid4().hex}"

    def envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created_s,
            "model": self.body.model,
            "choices": choices,
        }

    def echoed(self, choice: int) -> str:
        return str(self.body.prompt[choice // self.n]) if self.body.echo else ""

    def choice(self, index: int, part: Choice, *, first: bool, offset: int) -> tuple[Any, int]:
        """One choice, whole or in part, and the text offset after it."""
        logprobs = None
        if self.body.logprobs is not None and (part.logprobs or first):
            logprobs, offset = completion_logprobs(part.logprobs, self.decode, offset)
        reply = {
            "index": index,
            "text": (self.echoed(index) if first else "") + part.text,
            "logprobs": logprobs,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }
        if self.body.return_token_ids:
            reply["token_ids"] = part.token_ids
            if first:
                reply["prompt_token_ids"] = self.prompts[index // self.n]
        return reply, offset


async def _tokenize(
    state: ServerState, body: CompletionRequest, adapters: Sequence[AdapterUse]
) -> list[list[int]]:
    special = True if body.add_special_tokens is None else body.add_special_tokens

    async def one(prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await state.engine.tokenize(prompt, adapters, add_special_tokens=special)
        return prompt

    return list(await asyncio.gather(*(one(prompt) for prompt in body.prompt)))


@router.post("/v1/completions")
async def create_completion(
    body: CompletionRequest, request: Request, state: State, access: Caller
) -> Response:
    """Continue one or several prompts."""
    check_use(access, state, body)
    adapters = await select_adapters(state, body)
    with state.engine.hold(adapters) as hold:
        return await _answer(body, request, state, hold)


async def _answer(
    body: CompletionRequest, request: Request, state: ServerState, hold: Hold
) -> Response:
    params = completion_params(body)
    decode = state.engine.decoder(hold.uses)
    prompts = await _tokenize(state, body, hold.uses)
    for prompt in prompts:
        check_room(
            len(prompt),
            params.max_tokens,
            state.context_length,
            prompt_field="prompt",
            tokens_field="max_tokens",
        )
    reply = Reply(state, body, prompts, params.n, decode)
    generation = Generation(state, prompts, params, hold)
    if body.stream:
        await unless_gone(request.receive, generation.prime())
        headers = adapter_headers(generation)
        return EventStream(guarded(_events(reply, generation)), generation.aclose, headers)
    whole = collect(generation, prompts, params.n)
    choices, usage = await unless_gone(request.receive, whole)
    listed = [
        reply.choice(index, choice, first=True, offset=0)[0] for index, choice in enumerate(choices)
    ]
    content = reply.envelope(listed) | {"usage": usage.as_reply()} | idle_adapters(generation)
    return ReplyJSON(content, headers=adapter_headers(generation))


async def _events(reply: Reply, generation: Generation) -> AsyncIterator[bytes]:
    options = reply.body.usage_in_stream
    usage = Usage(reply.prompts, reply.n)
    offsets: dict[int, int] = {}
    async for news in generation:
        usage.add(news)
        first = news.choice not in offsets
        if not (first and reply.body.echo) and not has_news(reply.body.return_token_ids, news):
            continue
        part = Choice()
        part.add(news.delta)
        choice, offsets[news.choice] = reply.choice(
            news.choice, part, first=first, offset=offsets.get(news.choice, 0)
        )
        chunk = reply.envelope([choice])
        if options.continuous_usage_stats:
            chunk["usage"] = usage.as_reply()
        elif options.include_usage:
            chunk["usage"] = None
        yield event(chunk)
    if options.include_usage:
        yield event(reply.envelope([]) | {"usage": usage.as_reply()})
