"""What tiny checkpoints of Qwen's models for images and sound are made of."""

from __future__ import annotations

from typing import Any

from transformers import (
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2_5OmniProcessor,
    Qwen2AudioProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    WhisperFeatureExtractor,
)

from parity.multimodal_families import LANGUAGE, PATCH, SIDE, Family, text
from parity.multimodal_processors import VIDEO_STAND_INS

QWEN_TOWER = (
    r".*visual\.blocks\.\d+\.(attn\.(qkv|[qkv]|proj)|mlp\.((gate|up|down)_proj|(linear_)?fc[12]))"
)
QWEN_MERGER = r".*visual\.(merger|deepstack_merger_list\.\d+)\.(mlp\.[02]|linear_fc[12])"


def _grid_of_qwen() -> Any:
    return Qwen2VLImageProcessorPil(patch_size=PATCH, min_pixels=16 * 16, max_pixels=64 * 64)


def _whisper() -> WhisperFeatureExtractor:
    # One second is 100 frames of 16 mels, 50 positions of the encoder.
    return WhisperFeatureExtractor(feature_size=16, chunk_length=1)


QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}


def _qwen(
    model_type: str,
    processor: type[ProcessorMixin],
    video: str,
    vision: dict[str, Any],
    **more: Any,
) -> Family:
    """`vision` is put over what the vision towers of this line of models share."""
    shared = {"depth": 3, "num_heads": 2, "patch_size": PATCH}
    # Of the 8 frequencies of a head, how many turn with time, height and width.
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    return Family(
        config=lambda ids, size: {
            "model_type": model_type,
            "image_token_id": ids["image_token"],
            "video_token_id": ids["video_token"],
            "vision_start_token_id": ids["vision_start_token"],
            "vision_end_token_id": ids["vision_end_token"],
            "vision_config": {**shared, **vision},
            "text_config": text(size, f"{model_type}_text", rope_parameters=rope, **more),
        },
        processor=lambda tokenizer: processor(
            image_processor=_grid_of_qwen(),
            tokenizer=tokenizer,
            video_processor=VIDEO_STAND_INS[video](),
        ),
        tokens=QWEN_TOKENS,
        prompts={"image": "<|vision_start|><|image_pad|><|vision_end|>"},
        parts={"language": LANGUAGE, "tower": QWEN_TOWER, "connector": QWEN_MERGER},
    )


VISION_OF_QWEN2_5 = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "window_size": SIDE,  # 2 x 2 merged patches
    "fullatt_block_indexes": [1],
}


AUDIO_TOWER: dict[str, Any] = {
    "num_mel_bins": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "d_model": 32,
    "max_source_positions": 50,
}
AUDIO_LAYER = r".*audio_tower\.layers\.\d+\.(self_attn\.([qkv]_proj|out_proj)|fc[12])"


OMNI_TOKENS = {
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}


def _omni(ids: dict[str, int], size: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    vision = {**VISION_OF_QWEN2_5, "depth": 3, "num_heads": 2, "patch_size": PATCH}
    return {
        "model_type": "qwen2_5_omni_thinker",
        "image_token_index": ids["image_token"],
        "video_token_index": ids["video_token"],
        "audio_token_index": ids["audio_token"],
        "audio_start_token_id": ids["audio_bos_token"],
        "audio_end_token_id": ids["audio_eos_token"],
        "vision_start_token_id": ids["vision_bos_token"],
        "vision_end_token_id": ids["vision_eos_token"],
        "vision_config": vision,
        "audio_config": {**AUDIO_TOWER, "n_window": 10, "output_dim": 64},
        "text_config": text(size, "qwen2_5_omni_text", rope_parameters=rope),
    }


FAMILIES: dict[str, Family] = {
    "qwen2-vl": _qwen(
        "qwen2_vl",
        Qwen2VLProcessor,
        "Qwen2VLVideoProcessor",
        {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    ),
    "qwen2.5-vl": _qwen(
        "qwen2_5_vl", Qwen2_5_VLProcessor, "Qwen2VLVideoProcessor", VISION_OF_QWEN2_5
    ),
    "qwen3-vl": _qwen(
        "qwen3_vl",
        Qwen3VLProcessor,
        "Qwen3VLVideoProcessor",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        head_dim=16,
    ),
    "qwen2-audio": Family(
        config=lambda ids, size: {
            "model_type": "qwen2_audio",
            "audio_token_index": ids["audio_token"],
            "audio_config": {"model_type": "qwen2_audio_encoder", **AUDIO_TOWER},
            "text_config": text(size, "qwen2"),
        },
        processor=lambda tokenizer: Qwen2AudioProcessor(
            feature_extractor=_whisper(), tokenizer=tokenizer
        ),
        tokens={
            "audio_token": "<|AUDIO|>",
            "audio_bos_token": "<|audio_bos|>",
            "audio_eos_token": "<|audio_eos|>",
        },
        prompts={"audio": "<|audio_bos|><|AUDIO|><|audio_eos|>"},
        parts={
            "language": LANGUAGE,
            "tower": AUDIO_LAYER,
            "connector": r".*multi_modal_projector\.linear",
        },
    ),
    "qwen2.5-omni": Family(
        config=_omni,
        processor=lambda tokenizer: Qwen2_5OmniProcessor(
            image_processor=_grid_of_qwen(),
            video_processor=VIDEO_STAND_INS["Qwen2VLVideoProcessor"](),
            feature_extractor=_whisper(),
            tokenizer=tokenizer,
        ),
        tokens=OMNI_TOKENS,
        prompts={
            "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
            "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
        },
        parts={
            "language": LANGUAGE.replace("language_model", "model"),
            "tower": QWEN_TOWER,
            "connector": QWEN_MERGER,
            "audio tower": AUDIO_LAYER,
            "audio connector": r".*audio_tower\.proj",
        },
    ),
}
