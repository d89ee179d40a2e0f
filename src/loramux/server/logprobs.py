"""Log-probabilities in the two shapes that OpenAI's endpoints use."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from loramux.types import TokenLogprob, TokenLogprobs

# JSON has no infinity; this is what OpenAI and vLLM send for an impossible token.
LEAST = -9999.0

Decode = Callable[[int], str]


def _text(token: TokenLogprob, decode: Decode) -> str:
    return token.decoded_token or decode(token.token_id)


def _value(token: TokenLogprob) -> float:
    return max(token.logprob, LEAST) if math.isfinite(token.logprob) else LEAST


def completion_logprobs(
    entries: Sequence[TokenLogprobs], decode: Decode, first_offset: int
) -> tuple[dict[str, Any], int]:
    """The `logprobs` of a completion choice, and the text offset at which the next part begins.

    Each dictionary of `top_logprobs` holds the chosen token too, likely or not.
    """
    tokens, values, tops, offsets = [], [], [], []
    offset = first_offset
    for entry in entries:
        text = _text(entry.chosen, decode)
        top: dict[str, float] = {}
        for token in (*entry.top, entry.chosen):
            # Two ids may have one text; the likelier comes first and stays.
            top.setdefault(_text(token, decode), _value(token))
        tokens.append(text)
        values.append(_value(entry.chosen))
        tops.append(top)
        offsets.append(offset)
        offset += len(text)
    reply = {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }
    return reply, offset


def _chat_token(token: TokenLogprob, decode: Decode) -> dict[str, Any]:
    text = _text(token, decode)
    # A part of a character decodes to U+FFFD, whose bytes are not the token's.
    raw = None if "\ufffd" in text else list(text.encode("utf-8", "replace"))
    return {"token": text, "logprob": _value(token), "bytes": raw}


def chat_logprobs(entries: Sequence[TokenLogprobs], decode: Decode) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""
    content = [
        {
            **_chat_token(entry.chosen, decode),
            "top_logprobs": [_chat_token(token, decode) for token in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}
