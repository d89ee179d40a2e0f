"""What callers of `LLM` may pass: one for all prompts, or one a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from loramux.errors import InvalidField
from loramux.types import AdapterUse, MediaPrompt, PoolingParams, SamplingParams

Prompt = str | Mapping[str, Any] | Sequence[int]
Encoded = tuple[str | None, list[int] | MediaPrompt]  # the text, where there is one, and what runs
Uses = Sequence[AdapterUse]
Params = SamplingParams | PoolingParams
Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter for a prompt: its name, the folder it is in, and how strongly it applies.

    `lora_int_id` is accepted for vLLM's sake and plays no part: an adapter is its content. Those of
    `default_mm_loras` have the names `~image`, `~audio`, `~video` and ids from 1 in alphabetical order.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""
    scale: float = 1.0
    load_inplace: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt that is not tokenized yet: its adapters decide how. `modalities` are those of its media,
    and choose its adapters where none is named."""

    encode: Callable[[Uses], Encoded]
    modalities: frozenset[str] = frozenset()


LoRA = LoRARequest | Sequence[LoRARequest] | None


def prompts_of(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, of which a caller may give one alone."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def params_of(given: Params | Sequence[Params] | None, count: int) -> Sequence[Params]:
    """How each of `count` prompts is answered. Raises InvalidField."""
    if isinstance(given, Sequence):
        pooled = any(isinstance(one, PoolingParams) for one in given)
        return _one_each(list(given), count, "pooling_params" if pooled else "sampling_params")
    return [given or SamplingParams()] * count


def tokens_of(prompt: list[int] | MediaPrompt) -> list[int]:
    """The tokens of what runs."""
    return list(prompt.token_ids) if isinstance(prompt, MediaPrompt) else prompt


def uses_of(composition: Sequence[LoRARequest]) -> list[AdapterUse]:
    """The adapters of a prompt as the engine has them."""
    return [AdapterUse(lora.lora_name, lora.scale) for lora in composition]


def loras_of(given: LoRA | Sequence[LoRA], count: int) -> list[Sequence[LoRARequest] | None]:
    """A composition for each prompt, None where none is named. With one prompt, a flat list is its
    composition."""
    if given is None or isinstance(given, LoRARequest):
        return [_composition(given)] * count
    entries = list(given)
    nested = any(entry is None or not isinstance(entry, LoRARequest) for entry in entries)
    if count == 1 and not nested:
        return [_composition(entries)]  # type: ignore[arg-type]
    return [_composition(entry) for entry in _one_each(entries, count, "lora_request")]


def _composition(given: LoRA) -> Sequence[LoRARequest] | None:
    if given is None:
        return None
    return [given] if isinstance(given, LoRARequest) else list(given)


def _one_each(values: list[Entry], count: int, name: str) -> list[Entry]:
    if len(values) != count:
        raise InvalidField(f"{name} has {len(values)} entries for {count} prompts", field=name)
    return values
