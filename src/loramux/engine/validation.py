"""What a request must satisfy before it costs anything. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from loramux.errors import InvalidField, PromptTooLong
from loramux.types import AdapterRef, PoolingParams, SamplingParams, compose


def validate_request(
    prompt_token_ids: Sequence[int], params: SamplingParams, max_model_len: int, vocab_size: int
) -> SamplingParams:
    """Check a request against the model; returns `params` with `max_tokens` filled in.

    Raises InvalidField or PromptTooLong.
    """
    _check_prompt(prompt_token_ids, vocab_size)
    length = len(prompt_token_ids)
    if length >= max_model_len:
        raise PromptTooLong(
            f"the prompt has {length} tokens, and the context of {max_model_len} must also hold the "
            "answer",
            field="prompt",
        )
    for name, ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", tuple(token for token, _ in params.logit_bias)),
    ):
        outside = [t for t in ids if t >= vocab_size]
        if outside:
            raise InvalidField(
                f"{name} has token id {outside[0]}, outside the vocabulary of {vocab_size}",
                field=name,
            )
    left = max_model_len - length
    if params.max_tokens is None:
        return params.with_max_tokens(max(left, params.min_tokens or 1))
    if params.max_tokens > left:
        raise InvalidField(
            f"max_tokens is {params.max_tokens}, but after a prompt of {length} tokens the context of "
            f"{max_model_len} leaves {left}",
            field="max_tokens",
        )
    return params


def validate_pooling(
    prompt_token_ids: Sequence[int],
    params: PoolingParams,
    max_model_len: int,
    vocab_size: int,
    hidden_size: int,
) -> None:
    """Check a request that is pooled. Raises InvalidField or PromptTooLong."""
    _check_prompt(prompt_token_ids, vocab_size)
    length = len(prompt_token_ids)
    if length > max_model_len:
        raise PromptTooLong(
            f"the input has {length} tokens, and the context is {max_model_len}", field="prompt"
        )
    if params.dimensions is not None and params.dimensions > hidden_size:
        raise InvalidField(
            f"dimensions is {params.dimensions}, and the model has {hidden_size}",
            field="dimensions",
        )


def vocabulary_of(acquired: Sequence[tuple[AdapterRef, float]], base: int) -> int:
    """How many tokens the vocabulary of a request with these adapters has, `base` without them.

    Raises InvalidField where several of them bring a vocabulary of their own."""
    refs = {ref.digest: ref for ref in _applying(acquired) if ref.vocabulary_size}
    own = [r for r in refs.values() if r.vocabulary_rows or r.vocabulary_size != base]
    if len(own) > 1:
        names = ", ".join(repr(ref.name) for ref in own)
        raise InvalidField(
            f"adapters {names} each have rows of the vocabulary of their own; one of a sum may",
            field="lora",
        )
    return own[0].vocabulary_size if own else base


def tokenizer_of(acquired: Sequence[tuple[AdapterRef, float]]) -> str | None:
    """The digest of the adapter whose own tokenizer a request with these gets; None: the base model's.

    Raises InvalidField where several bring different ones."""
    refs = {ref.tokenizer: ref for ref in _applying(acquired) if ref.tokenizer}
    if len(refs) > 1:
        names = ", ".join(repr(ref.name) for ref in refs.values())
        raise InvalidField(
            f"adapters {names} each have a tokenizer or chat template of their own; one of a sum may",
            field="lora",
            remedy="name one of them, or start with --lora-tokenizers base",
        )
    return next((ref.digest for ref in refs.values()), None)


def _applying(acquired: Sequence[tuple[AdapterRef, float]]) -> list[AdapterRef]:
    """Those that a sum has: what adds up to scale 0 drops out, and its tokens and rows with it."""
    kept = {digest for digest, _ in compose([(ref.digest, scale) for ref, scale in acquired])}
    return [ref for ref, _ in acquired if ref.digest in kept]


def _check_prompt(prompt_token_ids: Sequence[int], vocab_size: int) -> None:
    if not prompt_token_ids:
        raise InvalidField("the prompt is empty", field="prompt")
    bad = next((t for t in prompt_token_ids if not 0 <= t < vocab_size), None)
    if bad is not None:
        raise InvalidField(
            f"token id {bad} is outside the vocabulary of {vocab_size}", field="prompt"
        )
