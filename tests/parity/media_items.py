"""Prompts with media as the engine has them, made of what the real processors say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchFeature

from loramux.types import MediaItem, Modality
from parity.multimodal import MediaOracle
from parity.oracle import Composition

OF_TOKENS = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
ARGUMENTS = {"image": "images", "audio": "audio"}
ATTRIBUTES = {"image": ("context_image_token", "image_token"), "audio": ("audio_token",)}


@dataclass(frozen=True)
class Prompt:
    """What the processor makes of the whole, and each item by itself, where it stands."""

    inputs: BatchFeature
    items: list[MediaItem]

    @property
    def ids(self) -> torch.Tensor:
        return self.inputs["input_ids"][0]  # [T]

    def rows(self, items: Sequence[MediaItem] | None = None) -> torch.Tensor:
        """Where the vectors of `items` stand, one after the other [M]."""
        spans = [span for item in items or self.items for span in item.spans]
        return torch.cat([torch.arange(*span) for span in spans])  # [M]


def placeholder(oracle: MediaOracle, modality: str) -> int:
    """The id of the token that stands for a vector of `modality`."""
    words = oracle.processor.tokenizer
    token = next(getattr(words, a) for a in ATTRIBUTES[modality] if hasattr(words, a))
    return int(words.convert_tokens_to_ids(token))


def make_prompt(oracle: MediaOracle, media: Mapping[Modality, Sequence[Any]]) -> Prompt:
    """All of `media` in one prompt, modality by modality."""
    written = oracle.family.prompts
    text = " and ".join(written[modality] for modality, found in media.items() for _ in found)
    arguments = {ARGUMENTS[modality]: list(found) for modality, found in media.items() if found}
    inputs = oracle.inputs(f"say {text} now", **arguments)
    ids = inputs["input_ids"][0]
    items = []
    for modality, found in media.items():
        places = (ids == placeholder(oracle, modality)).nonzero().flatten().tolist()
        for index, medium in enumerate(found):
            own = oracle.inputs(written[modality], **{ARGUMENTS[modality]: [medium]})
            count = int((own["input_ids"] == placeholder(oracle, modality)).sum())
            items.append(
                MediaItem(
                    modality,
                    f"{modality}{index}",
                    _runs(places[:count]),
                    {key: value for key, value in own.items() if key not in OF_TOKENS},
                )
            )
            places = places[count:]
        assert not places
    return Prompt(inputs, items)


def _runs(places: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Neighbours as spans."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    return tuple(runs)


def features(
    oracle: MediaOracle, prompt: Prompt, composition: Composition | None = None
) -> torch.Tensor:
    """What the whole model puts in the place of media [1 + L, M, D]: taken where it goes into the first
    layer, and, of the layers behind that, where it goes into the decoder."""
    decoder: Any = oracle.base.get_decoder()
    seen: dict[str, Any] = {}

    def into_decoder(_: Any, inputs: Any, given: dict[str, Any]) -> None:
        seen["deep"] = given.get("deepstack_visual_embeds") or []

    def into_layer(_: Any, inputs: tuple[Any, ...], given: dict[str, Any]) -> None:
        seen["first"] = inputs[0] if inputs else given["hidden_states"]  # [1, T, D]

    hooks = [
        decoder.register_forward_pre_hook(into_decoder, with_kwargs=True),
        decoder.layers[0].register_forward_pre_hook(into_layer, with_kwargs=True),
    ]
    try:
        oracle.logits(prompt.inputs, composition)
    finally:
        for hook in hooks:
            hook.remove()
    rows = prompt.rows()  # [M]
    order = rows.argsort().argsort()  # [M]: deepstack's come in the order of the prompt
    return torch.stack([seen["first"][0, rows], *(one[order] for one in seen["deep"])])
