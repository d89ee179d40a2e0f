"""What a tiny checkpoint of a family with images is made of: configuration, processor, names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3Processor,
    InternVLProcessor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PixtralImageProcessorPil,
    ProcessorMixin,
    SiglipImageProcessorPil,
    SmolVLMProcessor,
)

from parity.multimodal_processors import (
    VIDEO_STAND_INS,
    Idefics3ImageProcessorPil,
    SmolVLMImageProcessorPil,
    pixtral_processor,
)
from tiny import COMMON

SIDE = 32
PATCH = 8
SQUARE = {"height": SIDE, "width": SIDE}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
LANGUAGE = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
PROJECTOR = r".*multi_modal_projector\.linear_[12]"
INTERNVL_LAYER = r"(attention\.([qkv]_proj|projection_layer)|mlp\.fc[12])"
SIGLIP_LAYER = r"(self_attn\.([qkv]_proj|out_proj)|mlp\.fc[12])"

Targets = str | dict[str, Any]
"""PEFT's `target_modules`, or other settings of a `LoraConfig`."""


@dataclass(frozen=True)
class Family:
    """`config(ids, size)` and `processor(tokenizer)` make the parts; `ids` are those of `tokens`, by the
    tokenizer's attribute, and `size` is the number of tokens. `prompts` has what stands for one item of
    a modality in a prompt, `parts` what an adapter on each part of the model targets."""

    config: Callable[[dict[str, int], int], dict[str, Any]]
    processor: Callable[[Any], ProcessorMixin]
    tokens: dict[str, str]
    prompts: dict[str, str]
    parts: dict[str, Targets]
    more_tokens: tuple[str, ...] = ()
    later: dict[str, int] = field(default_factory=lambda: {"mm_token_type_ids": 0})
    """Inputs with a value a token: what they say of generated tokens."""


def text(size: int, model_type: str = "llama", **more: Any) -> dict[str, Any]:
    return {**COMMON, "model_type": model_type, "vocab_size": size, **more}


def _llava(ids: dict[str, int], size: int) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "image_token_index": ids["image_token"],
        "vision_config": {"model_type": "clip_vision_model", **TOWER},
        "text_config": text(size),
    }


def _pixtral_tower() -> dict[str, Any]:
    rope = {"rope_type": "axial", "rope_theta": 1e4}
    sizes = {**TOWER, "image_size": 64, "head_dim": 16, "rope_parameters": rope}
    return {"model_type": "pixtral", **sizes}


def _pixtral_processor(tokenizer: Any, merge: int) -> ProcessorMixin:
    images = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size=PATCH)
    return pixtral_processor()(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, spatial_merge_size=merge
    )


IDEFICS = {
    "tokens": {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
    },
    "more_tokens": tuple(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
    "prompts": {"image": "<image>"},
    "parts": {
        "language": LANGUAGE.replace("language_model", "text_model"),
        "tower": rf".*vision_model\.encoder\.layers\.\d+\.{SIGLIP_LAYER}",
        "connector": r".*connector\.modality_projection\.proj",
    },
}


def _idefics(model_type: str, images: Any, processor: Any, **more: Any) -> Family:
    settings = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": SIDE}}
    return Family(
        config=lambda ids, size: {
            "model_type": model_type,
            "image_token_id": ids["image_token"],
            "pad_token_id": 0,
            "vision_config": TOWER,
            "text_config": text(size),
        },
        processor=lambda tokenizer: processor(
            image_processor=images(**settings), tokenizer=tokenizer, image_seq_len=4, **more
        ),
        **IDEFICS,
    )


def _gemma3(ids: dict[str, int], size: int) -> dict[str, Any]:
    # A window shorter than an image's part of the prompt, and layers with and without one.
    layers = {"num_hidden_layers": 3, "sliding_window": 12, "head_dim": 16}
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    return {
        "model_type": "gemma3",
        "image_token_index": ids["image_token"],
        "boi_token_index": ids["boi_token"],
        "eoi_token_index": ids["eoi_token"],
        "mm_tokens_per_image": 16,
        "tie_word_embeddings": False,
        "vision_config": {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False},
        "text_config": text(size, "gemma3_text", **layers, layer_types=types),
    }


def _paligemma_processor(tokenizer: Any) -> ProcessorMixin:
    images = SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 16
    return PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)


def _llava_like(config: Any, processor: Any, images: Any) -> Family:
    return Family(
        config=config,
        processor=lambda tokenizer: processor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ),
        tokens={"image_token": "<image>"},
        prompts={"image": "<image>"},
        parts={
            "language": LANGUAGE,
            "tower": rf".*vision_tower\.encoder\.layers\.\d+\.{SIGLIP_LAYER}",
            "connector": PROJECTOR,
        },
    )


def _pixtral_like(config: Any, merge: int, connector: str) -> Family:
    return Family(
        config=lambda ids, size: {
            "image_token_index": ids["image_token"],
            "vision_config": _pixtral_tower(),
            "text_config": text(size, "mistral", sliding_window=None, head_dim=16),
            **config,
        },
        processor=lambda tokenizer: _pixtral_processor(tokenizer, merge),
        tokens={
            "image_token": "[IMG]",
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
        },
        prompts={"image": "[IMG]"},
        parts={
            "language": LANGUAGE,
            "tower": r".*vision_tower\.transformer\.layers\.\d+\.(attention|feed_forward)\..*_proj",
            "connector": connector,
        },
    )


SIGLIP_TOWER = rf".*vision_tower\.encoder\.layers\.\d+\.{SIGLIP_LAYER}"
PINPOINTS = [[SIDE, 64], [64, SIDE], [64, 64]]

FAMILIES: dict[str, Family] = {
    "llava": _llava_like(
        _llava,
        LlavaProcessor,
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE),
    ),
    "llava-next": _llava_like(
        lambda ids, size: {
            **_llava(ids, size),
            "model_type": "llava_next",
            "image_grid_pinpoints": PINPOINTS,
        },
        LlavaNextProcessor,
        LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
        ),
    ),
    "pixtral": _pixtral_like(
        {
            "model_type": "llava",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        1,
        PROJECTOR,
    ),
    "mistral3": _pixtral_like(
        {"model_type": "mistral3", "spatial_merge_size": 2, "tie_word_embeddings": False},
        2,
        r".*multi_modal_projector\.(linear_[12]|patch_merger\.merging_layer)",
    ),
    "idefics3": _idefics("idefics3", Idefics3ImageProcessorPil, Idefics3Processor),
    "smolvlm": _idefics(
        "smolvlm",
        SmolVLMImageProcessorPil,
        SmolVLMProcessor,
        video_processor=VIDEO_STAND_INS["SmolVLMVideoProcessor"](),
    ),
    "internvl": Family(
        config=lambda ids, size: {
            "model_type": "internvl",
            "image_token_id": ids["context_image_token"],
            "image_seq_length": 4,
            "tie_word_embeddings": False,
            "vision_config": {**TOWER, "layer_scale_init_value": 1.0},
            "text_config": text(size, "qwen2"),
        },
        processor=lambda tokenizer: InternVLProcessor(
            image_processor=GotOcr2ImageProcessorPil(
                size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=3
            ),
            tokenizer=tokenizer,
            video_processor=VIDEO_STAND_INS["InternVLVideoProcessor"](),
            image_seq_length=4,
        ),
        tokens={
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
        prompts={"image": "<IMG_CONTEXT>"},
        parts={
            "language": LANGUAGE,
            "tower": rf".*vision_tower\.encoder\.layer\.\d+\.{INTERNVL_LAYER}",
            "connector": PROJECTOR,
        },
    ),
    "gemma3": Family(
        config=_gemma3,
        processor=lambda tokenizer: Gemma3Processor(
            image_processor=Gemma3ImageProcessorPil(size=SQUARE),
            tokenizer=tokenizer,
            image_seq_length=16,
        ),
        tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        prompts={"image": "<start_of_image>"},
        parts={
            "language": LANGUAGE,
            "tower": SIGLIP_TOWER,
            # The connector has no linear layer, but a matrix.
            "connector": {
                "target_modules": [],
                "target_parameters": ["multi_modal_projector.mm_input_projection_weight"],
            },
        },
        later={"token_type_ids": 0},
    ),
    "paligemma": Family(
        config=lambda ids, size: {
            "model_type": "paligemma",
            "image_token_index": ids["image_token"],
            "projection_dim": 64,
            "tie_word_embeddings": False,
            "hidden_size": 64,
            "vision_config": {
                "model_type": "siglip_vision_model",
                **TOWER,
                "vision_use_head": False,
            },
            "text_config": text(size, "gemma", head_dim=16),
        },
        processor=_paligemma_processor,
        tokens={"image_token": "<image>"},
        prompts={"image": "<image>"},
        parts={
            "language": LANGUAGE,
            "tower": SIGLIP_TOWER,
            "connector": r".*multi_modal_projector\.linear",
        },
        later={"token_type_ids": 1},
    ),
}
