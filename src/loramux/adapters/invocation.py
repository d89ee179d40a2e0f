"""`alora_invocation_tokens` of a PEFT configuration: activated LoRA, and what it does not go with.

PEFT adds such an adapter's LoRA to the tokens from its invocation on, and to none before. What else an
adapter trains applies to all tokens, so the prefix before the invocation would not be the base model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INVOCATION = "alora_invocation_tokens"
TASK = "CAUSAL_LM"
MAX_TOKENS = 512
LARGEST_ID = 1 << 31

_REFUSED_BY_PEFT = {
    "use_dora": "PEFT has no activated DoRA",
    "use_bdlora": "PEFT has no activated block-diagonal LoRA",
    "target_parameters": "PEFT activates LoRA on linear layers only",
}
_EVERYWHERE = ("bias", "modules_to_save", "trainable_token_indices")


def invocation_of(data: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens; () for LoRA that always applies, as PEFT takes an empty list."""
    return tuple(data.get(INVOCATION) or ())


def is_badly_typed(data: Mapping[str, Any]) -> bool:
    """Whether it is set, and to something else than a list of up to `MAX_TOKENS` token ids."""
    value = data.get(INVOCATION)
    if value is None or value is False or value == []:
        return False
    return not (
        isinstance(value, list)
        and len(value) <= MAX_TOKENS
        and all(type(token) is int and 0 <= token < LARGEST_ID for token in value)
    )


def reasons_against(data: Mapping[str, Any]) -> list[str]:
    """Why an activated LoRA cannot be served with the rest of its configuration."""
    if not data.get(INVOCATION):
        return []
    reasons = [
        f"{INVOCATION} with {key}: {why}" for key, why in _REFUSED_BY_PEFT.items() if data.get(key)
    ]
    reasons += [
        f"{INVOCATION} with {key}: what that trains applies before the invocation too, where an "
        "activated LoRA must leave the base model as it is"
        for key in _EVERYWHERE
        if data.get(key) and data[key] != "none"
    ]
    init = data.get("init_lora_weights")
    if isinstance(init, str) and init.lower() == "mica":
        reasons.append(f"{INVOCATION} with init_lora_weights={init!r}: PEFT has no activated MiCA")
    task = data.get("task_type")
    if not isinstance(task, str) or task.upper() != TASK:
        said = repr(task)[:40] if isinstance(task, str | None) else type(task).__name__
        reasons.append(
            f"{INVOCATION} with task_type {said}: PEFT activates LoRA for {TASK} only, and under any "
            f'other task applies it nowhere; if it was trained for that, set task_type to "{TASK}"'
        )
    return reasons


def reasons_of_places(
    invocation: tuple[int, ...], vocab_size: int, experts: bool, towers: list[str]
) -> list[str]:
    """Why an activated LoRA cannot be served on a model of `vocab_size` tokens (0: not known), with LoRA
    on its `experts`, or on these modules of its `towers`."""
    if not invocation:
        return []
    reasons = []
    outside = [token for token in invocation if token >= vocab_size > 0]
    if outside:
        reasons.append(
            f"{INVOCATION} has the token id {outside[0]}, outside the vocabulary of {vocab_size}: no "
            "prompt could invoke it"
        )
    if experts:
        reasons.append(
            f"{INVOCATION} with LoRA on experts: PEFT activates LoRA on linear layers only"
        )
    if towers:
        reasons.append(
            f"{INVOCATION} with LoRA on {towers[0]}: an invocation is a place among tokens, and towers "
            "and connectors see none"
        )
    return reasons
