"""What tiny checkpoints of further models for sound are made of."""

from __future__ import annotations

from typing import Any

from transformers import (
    GraniteSpeechProcessor,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalProcessor,
    ProcessorMixin,
)

from parity.multimodal_families import LANGUAGE, SIDE, TOWER, Family, text
from parity.multimodal_processors import NoPhi4Images, NumpyGraniteSpeechFeatureExtractor


def _granite_speech(ids: dict[str, int], size: int) -> dict[str, Any]:
    former = {"hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 48}
    former |= {"num_hidden_layers": 2, "num_attention_heads": 2, "cross_attention_frequency": 1}
    encoder = {"input_dim": 32, "num_layers": 2, "hidden_dim": 32, "num_heads": 2, "output_dim": 12}
    return {
        "model_type": "granite_speech",
        "audio_token_index": ids["audio_token"],
        "has_lora_adapter": False,
        "tie_word_embeddings": False,
        "encoder_config": {**encoder, "context_size": 20, "max_pos_emb": 40},
        "projector_config": {"model_type": "blip_2_qformer", **former},
        "text_config": text(size, "granite"),
    }


def _granite_speech_processor(tokenizer: Any) -> ProcessorMixin:
    features = NumpyGraniteSpeechFeatureExtractor(n_mels=16)
    return GraniteSpeechProcessor(audio_processor=features, tokenizer=tokenizer)


def _phi4(ids: dict[str, int], size: int) -> dict[str, Any]:
    vision = {**TOWER, "crop_size": SIDE, "image_token_id": ids["image_token"]}
    audio = {"hidden_size": 32, "intermediate_size": 48, "num_blocks": 2, "num_attention_heads": 2}
    audio |= {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "input_size": 80}
    audio |= {"nemo_conv_channels": 8, "audio_token_id": ids["audio_token"]}
    return {
        **text(size, "phi4_multimodal"),
        "vision_config": vision,
        "audio_config": audio,
    }


PHI4_LAYER = r"model\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)"
PHI4_AUDIO = r".*audio_embed\.encoder\.encoders\.\d+"

FAMILIES: dict[str, Family] = {
    "granite-speech": Family(
        config=_granite_speech,
        processor=_granite_speech_processor,
        tokens={"audio_token": "<|audio|>"},
        prompts={"audio": "<|audio|>"},
        parts={
            "language": LANGUAGE,
            "tower": r".*encoder\.layers\.\d+\.(ff[12]\..*_proj|attn\.to_\w+)",
            "connector": r".*projector\.(linear|qformer\..*attention\.(query|key|value))",
        },
    ),
    "phi4-multimodal": Family(
        config=_phi4,
        processor=lambda tokenizer: Phi4MultimodalProcessor(
            image_processor=NoPhi4Images(),
            audio_processor=Phi4MultimodalFeatureExtractor(),
            tokenizer=tokenizer,
        ),
        tokens={"image_token": "<|image|>", "audio_token": "<|audio|>"},
        prompts={"audio": "<|audio|>"},
        parts={
            "language": PHI4_LAYER,
            "tower": rf"{PHI4_AUDIO}\.(self_attn\.[qkvo]_proj|feed_forward_(in|out)\..*_proj)",
            "connector": r".*audio_embed\.(up|down)_proj_for_speech",
        },
    ),
}
