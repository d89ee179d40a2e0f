"""From a request's body to the engine's `SamplingParams`."""

from __future__ import annotations

from typing import Any

from loramux.errors import InvalidField, PromptTooLong
from loramux.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationBody
from loramux.types import SamplingParams

DEFAULT_COMPLETION_TOKENS = 16

# Fields that body and SamplingParams share by name; null leaves the engine's default.
SHARED_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "logit_bias",
)


def _shared(body: GenerationBody) -> dict[str, Any]:
    given = {name: getattr(body, name) for name in SHARED_FIELDS}
    return {name: value for name, value in given.items() if value is not None}


def completion_params(body: CompletionRequest) -> SamplingParams:
    """Raises InvalidField."""
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return SamplingParams(**_shared(body), max_tokens=max_tokens, logprobs=body.logprobs)


def chat_params(body: ChatCompletionRequest) -> SamplingParams:
    """Raises InvalidField."""
    max_tokens = body.max_completion_tokens or body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return SamplingParams(**_shared(body), max_tokens=max_tokens, logprobs=logprobs)


def check_room(
    prompt_tokens: int, max_tokens: int | None, limit: int, *, prompt_field: str, tokens_field: str
) -> None:
    """Refuse what cannot fit the context of `limit` tokens, naming the field to change."""
    if prompt_tokens == 0:
        raise InvalidField(f"{prompt_field} has no tokens", field=prompt_field)
    if prompt_tokens >= limit:
        raise PromptTooLong(
            f"{prompt_field} has {prompt_tokens} tokens and the context is {limit} with the answer",
            field=prompt_field,
            remedy=f"send at most {limit - 1} tokens",
        )
    room = limit - prompt_tokens
    if max_tokens is not None and max_tokens > room:
        raise InvalidField(
            f"{tokens_field} {max_tokens} is beyond the context: "
            f"{limit} tokens less {prompt_tokens} of the prompt leave {room}",
            field=tokens_field,
            remedy=f"use at most {room}",
        )
