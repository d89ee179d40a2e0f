"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from loramux.content import check_modalities
from loramux.engine.hold import Hold
from loramux.server.access import Caller
from loramux.server.disconnect import unless_gone
from loramux.server.encoding import ReplyJSON
from loramux.server.generation import (
    Choice,
    Generation,
    Prompt,
    Usage,
    collect,
    has_news,
    tokens_of,
)
from loramux.server.logprobs import Decode, chat_logprobs
from loramux.server.protocol import ChatCompletionRequest
from loramux.server.sampling import chat_params, check_room
from loramux.server.selection import (
    adapter_headers,
    check_use,
    default_adapters,
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
    body: ChatCompletionRequest
    prompt: Prompt
    decode: Decode
    defaults: list[dict[str, Any]] = field(default_factory=list)
    idle: dict[str, Any] = field(default_factory=dict)
    id: str = ""
    created_s: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"chatcmpl-{self.body.request_id or uuid.uuid4().hex}"

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created_s,
            "model": self.body.model,
            "choices": choices,
        }

    def choice(self, index: int, part: Choice, content: dict[str, Any]) -> dict[str, Any]:
        """One choice; `content` is its `message` or `delta`."""
        logprobs = None
        if self.body.logprobs and part.logprobs:
            logprobs = chat_logprobs(part.logprobs, self.decode)
        reply = {
            "index": index,
            **content,
            "logprobs": logprobs,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }
        if self.body.return_token_ids:
            reply["token_ids"] = part.token_ids
        return reply

    def tell(self, generation: Generation) -> None:
        """What is known once the first event is there."""
        self.defaults = default_adapters(generation.versions)
        self.idle = idle_adapters(generation)

    def once(self) -> dict[str, Any]:
        """What the answer says but once: the prompt's tokens, adapters that nobody had named, and those
        that the prompt did not invoke."""
        said: dict[str, Any] = {"lora": self.defaults} if self.defaults else {}
        said |= self.idle
        if self.body.return_token_ids:
            said["prompt_token_ids"] = list(tokens_of(self.prompt))
        return said


async def _render(
    state: ServerState, body: ChatCompletionRequest, adapters: Sequence[AdapterUse]
) -> Prompt:
    """The prompt. Media are loaded first, all of them."""
    how: dict[str, Any] = {
        "add_generation_prompt": body.opens_turn,
        "continue_final_message": bool(body.continue_final_message),
        "template_kwargs": body.chat_template_kwargs,
    }
    engine = state.engine
    check_modalities(body.media, engine.modalities)
    if not engine.modalities:
        turns = [message.as_turn() for message in body.messages]
        return await engine.render_chat(turns, adapters, **how)
    turns = [message.as_turn_of_parts() for message in body.messages]
    async with state.media.loaded(body.media) as media:
        prompt = await engine.render_chat_media(turns, media, adapters, **how)
    return prompt if prompt.items else prompt.token_ids


@router.post("/v1/chat/completions")
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, state: State, access: Caller
) -> Response:
    """Answer a conversation."""
    check_use(access, state, body)
    adapters = await select_adapters(state, body, {part.modality for part in body.media})
    with state.engine.hold(adapters) as hold:
        return await _answer(body, request, state, hold)


async def _answer(
    body: ChatCompletionRequest, request: Request, state: ServerState, hold: Hold
) -> Response:
    params = chat_params(body)
    decode = state.engine.decoder(hold.uses)
    rendering = _render(state, body, hold.uses)
    prompt = await (unless_gone(request.receive, rendering) if body.media else rendering)
    named = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    check_room(
        len(tokens_of(prompt)),
        params.max_tokens,
        state.context_length,
        prompt_field="messages",
        tokens_field=named,
    )
    reply = Reply(state, body, prompt, decode)
    generation = Generation(state, [prompt], params, hold)
    if body.stream:
        await unless_gone(request.receive, generation.prime())
        reply.tell(generation)
        events = guarded(_events(reply, generation, params.n))
        return EventStream(events, generation.aclose, adapter_headers(generation))
    choices, usage = await unless_gone(request.receive, collect(generation, [prompt], params.n))
    reply.tell(generation)
    headers = adapter_headers(generation)
    return ReplyJSON(_whole(reply, choices, usage), headers=headers)


def _whole(reply: Reply, choices: list[Choice], usage: Usage) -> dict[str, Any]:
    listed = [
        reply.choice(index, choice, {"message": {"role": "assistant", "content": choice.text}})
        for index, choice in enumerate(choices)
    ]
    return reply.envelope("chat.completion", listed) | {"usage": usage.as_reply()} | reply.once()


async def _events(reply: Reply, generation: Generation, n: int) -> AsyncIterator[bytes]:
    options = reply.body.usage_in_stream
    usage = Usage([reply.prompt], n)
    opened: set[int] = set()

    def chunk(choices: list[dict[str, Any]]) -> bytes:
        content = reply.envelope("chat.completion.chunk", choices)
        if options.continuous_usage_stats or (options.include_usage and not choices):
            content["usage"] = usage.as_reply()
        elif options.include_usage:
            content["usage"] = None
        if not opened:
            content |= reply.once()
        return event(content)

    async for news in generation:
        if news.choice not in opened:
            opening = {"delta": {"role": "assistant", "content": ""}}
            yield chunk([reply.choice(news.choice, Choice(), opening)])
            opened.add(news.choice)
        usage.add(news)
        if not has_news(reply.body.return_token_ids, news):
            continue
        part = Choice()
        part.add(news.delta)
        delta = {"content": part.text} if part.text else {}
        yield chunk([reply.choice(news.choice, part, {"delta": delta})])
    if options.include_usage:
        yield chunk([])
