"""How each family of models makes vectors of media: which of its own functions, and on what.

An item's `inputs` are what the model's processor makes of that item alone, every tensor with a batch
dimension. Those of several items are laid one behind the other and encoded at once where the family
gives each of them the same vectors as alone; what comes out is one row a token, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from loramux.types import MediaItem, Modality

Inputs = dict[str, torch.Tensor]
Rows = tuple[torch.Tensor, Sequence[torch.Tensor]]
"""Vectors [M, D], and for each of the first layers more of them [M, D]."""

PHI4_MODE = "audio_projection_mode"
"""What a sound's inputs say where it stands in a prompt of Phi-4: beside images it is "vision"."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """`run(model, inputs, count)` makes `count` vectors of the tensors `keys`; those that an item lacks
    are left out. Items are encoded at once if their tensors have the same shapes behind the first
    dimension, and only where `together` is True. With `mixed` they may take different adapters: whatever
    the model's linear layers are given has then so many rows for each row of the first of `keys`."""

    keys: tuple[str, ...]
    run: Callable[[Any, Inputs, int], Rows]
    together: bool = True
    mixed: bool = False


def encoder_of(model: PreTrainedModel, item: MediaItem) -> Encoder | None:
    """What encodes `item` for `model`; None where nothing does."""
    found = ENCODERS.get(_kind(model), {}).get(item.modality)
    if found is PHI4_SOUNDS and item.inputs.get(PHI4_MODE) == "vision":
        return PHI4_SOUNDS_BESIDE_IMAGES
    return found


def modalities(model: PreTrainedModel) -> frozenset[Modality]:
    """What `model` takes beside text."""
    return frozenset(ENCODERS.get(_kind(model), {}))


def _kind(model: PreTrainedModel) -> str:
    kind: str = model.config.model_type
    if kind == "llava" and model.config.vision_config.model_type == "pixtral":
        return "pixtral"
    return kind


# --- families --------------------------------------------------------------------------------------


def _images(model: Any, inputs: Inputs, count: int) -> Rows:
    return _rows(model.get_image_features(**inputs, return_dict=True))


def _videos(model: Any, inputs: Inputs, count: int) -> Rows:
    return _rows(model.get_video_features(**inputs, return_dict=True))


def _rows(out: Any) -> Rows:
    """What `pooler_output` has, a tensor or one for each image or crop, as rows."""
    found = out.pooler_output
    parts = [found] if isinstance(found, torch.Tensor) else found
    rows = torch.cat([part.flatten(0, -2) for part in parts])  # [M, D]
    return rows, getattr(out, "deepstack_features", None) or ()


def _omni_sounds(model: Any, inputs: Inputs, count: int) -> Rows:
    return model.get_audio_features(**inputs, return_dict=True).last_hidden_state, ()


def _granite_sounds(model: Any, inputs: Inputs, count: int) -> Rows:
    out = model.get_audio_features(inputs["input_features"], return_dict=True)
    vectors, mask = out.pooler_output, inputs.get("input_features_mask")  # [B, N, D], [B, N]
    return (vectors.flatten(0, 1) if mask is None else vectors[mask.bool()]), ()


def _qwen2_sounds(model: Any, inputs: Inputs, count: int) -> Rows:
    """What stands in the midst of Qwen2-Audio's forward."""
    tower = model.model.audio_tower
    features, mask = inputs["input_features"], inputs["feature_attention_mask"]
    lengths, counts = tower._get_feat_extract_output_lengths(mask.sum(-1))  # [B] each
    places = torch.arange((features.shape[-1] - 2) // 2 + 1, device=features.device)  # [S]
    attention = create_bidirectional_mask(
        config=tower.config,
        inputs_embeds=features.new_zeros(len(features), len(places), 1),  # [B, S, 1]
        attention_mask=(places < lengths.unsqueeze(1)).long(),  # [B, S]
    )
    encoded = tower(features, attention_mask=attention).last_hidden_state  # [B, S / 2, d]
    vectors = model.model.multi_modal_projector(encoded)  # [B, S / 2, D]
    return vectors[places[: vectors.shape[1]] < counts.unsqueeze(1)], ()


def _phi4_images(model: Any, inputs: Inputs, count: int) -> Rows:
    extend = model.model.embed_tokens_extend
    return _written(model, extend.image_embed, extend.image_token_id, inputs, count)


def _phi4_sounds(model: Any, inputs: Inputs, count: int, mode: str = "speech") -> Rows:
    extend = model.model.embed_tokens_extend
    given: dict[str, Any] = {**inputs, PHI4_MODE: mode}
    return _written(model, extend.audio_embed, extend.audio_token_id, given, count)


def _phi4_sounds_beside_images(model: Any, inputs: Inputs, count: int) -> Rows:
    return _phi4_sounds(model, inputs, count, "vision")


def _written(
    model: Any, embed: Callable[..., torch.Tensor], token: int, inputs: dict[str, Any], count: int
) -> Rows:
    """What Phi-4's `embed` writes over the embeddings of `count` tokens."""
    ids = torch.full((1, count), token, device=model.device)  # [1, M]
    nothing = torch.zeros(1, count, model.config.hidden_size, dtype=model.dtype, device=ids.device)
    return embed(input_ids=ids, inputs_embeds=nothing, **inputs)[0], ()  # [M, D]


PIXELS = Encoder(("pixel_values",), _images, mixed=True)
SIZED = Encoder(("pixel_values", "image_sizes"), _images, mixed=True)
# All images of a call stand in one row, behind a mask as large as that row's square.
SIZED_ALONE = Encoder(("pixel_values", "image_sizes"), _images, together=False)
MASKED = Encoder(("pixel_values", "pixel_attention_mask"), _images, mixed=True)
GRIDS: dict[Modality, Encoder] = {
    "image": Encoder(("pixel_values", "image_grid_thw"), _images, mixed=True),
    "video": Encoder(("pixel_values_videos", "video_grid_thw"), _videos, mixed=True),
}
HEARD = ("input_features", "feature_attention_mask")
# A mask of padding is left out: it only adds one to the scores, and alone a sound has none.
PHI4_HEARD = ("audio_input_features", "audio_embed_sizes")
PHI4_SEEN = ("image_pixel_values", "image_sizes", "image_attention_mask")
PHI4_SOUNDS = Encoder(PHI4_HEARD, _phi4_sounds)
PHI4_SOUNDS_BESIDE_IMAGES = Encoder(PHI4_HEARD, _phi4_sounds_beside_images)

ENCODERS: dict[str, dict[Modality, Encoder]] = {
    "gemma3": {"image": PIXELS},
    "granite_speech": {
        "audio": Encoder(("input_features", "input_features_mask"), _granite_sounds)
    },
    "idefics3": {"image": MASKED},
    "internvl": {"image": PIXELS, "video": PIXELS},
    "llava": {"image": PIXELS},
    "llava_next": {"image": SIZED},
    "mistral3": {"image": SIZED_ALONE},
    "phi4_multimodal": {"image": Encoder(PHI4_SEEN, _phi4_images), "audio": PHI4_SOUNDS},
    "pixtral": {"image": SIZED_ALONE},
    "qwen2_5_omni_thinker": {**GRIDS, "audio": Encoder(HEARD, _omni_sounds)},
    "qwen2_5_vl": GRIDS,
    "qwen2_audio": {"audio": Encoder(HEARD, _qwen2_sounds)},
    "qwen2_vl": GRIDS,
    "qwen3_vl": GRIDS,
    "smolvlm": {"image": MASKED, "video": MASKED},
}
"""By kind of model; Pixtral is a LLaVA to its configuration."""
