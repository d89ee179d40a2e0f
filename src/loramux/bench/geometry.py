"""A model by its geometry alone: a checkpoint folder without anybody's weights.

The engine makes them up (`load_format="dummy"`); adapters for it are in `random_adapters.py`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SPECIAL = ("<pad>", "<bos>", "<eos>")
MEDIA_TOKENS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MEMORY_DISK = Path("/dev/shm")  # files there are in the page cache by nature


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of a Llama-like model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int = 8192
    rope_theta: float = 500000.0

    @property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        return _llama_config(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureGeometry(Geometry):
    """The sizes of a Qwen3-like model in which every layer has `experts` experts and no MLP.

    `intermediate` is what the config says of an MLP that no layer has."""

    experts: int
    experts_per_token: int
    expert_intermediate: int

    @property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        config = _llama_config(self)
        del config["mlp_bias"]
        return {
            **config,
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "rms_norm_eps": 1e-6,
            "num_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "moe_intermediate_size": self.expert_intermediate,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionGeometry(Geometry):
    """The sizes of a model like Qwen2.5-VL: a Qwen2-like decoder, and a tower of `depth` blocks."""

    depth: int
    vision_hidden: int
    vision_intermediate: int
    vision_heads: int
    patch_size: int = 14
    window_size: int = 112
    first_media_id: int = 151652
    """Where the ids of `MEDIA_TOKENS` begin."""

    @property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        start, end, _, image, video = range(self.first_media_id, self.first_media_id + 5)
        text = _llama_config(self)
        for name in ("architectures", "attention_bias", "head_dim", "mlp_bias", "rope_theta"):
            del text[name]
        eighth = self.head_dim // 8
        rope = {
            "rope_type": "default",
            "rope_theta": self.rope_theta,
            "mrope_section": [eighth, 3 * eighth // 2, 3 * eighth // 2],
        }
        text |= {"model_type": "qwen2_5_vl_text", "rms_norm_eps": 1e-6, "rope_parameters": rope}
        vision = {
            "model_type": "qwen2_5_vl_vision",
            "depth": self.depth,
            "hidden_size": self.vision_hidden,
            "intermediate_size": self.vision_intermediate,
            "num_heads": self.vision_heads,
            "out_hidden_size": self.hidden,
            "patch_size": self.patch_size,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": self.window_size,
            "fullatt_block_indexes": list(range(self.depth // 4 - 1, self.depth, self.depth // 4)),
            "tokens_per_second": 2,
        }
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "torch_dtype": "bfloat16",
            "tie_word_embeddings": False,
            "text_config": text,
            "vision_config": vision,
            "vision_start_token_id": start,
            "vision_end_token_id": end,
            "image_token_id": image,
            "video_token_id": video,
            **special_ids(),
        }


GEOMETRIES: dict[str, Geometry] = {
    "llama-3.1-8b": Geometry(32, 4096, 14336, 32, 8, 128, 128256),
    "llama-3.1-70b": Geometry(80, 8192, 28672, 64, 8, 128, 128256),
    "tiny": Geometry(2, 64, 128, 4, 2, 16, 512, max_positions=2048),
    "qwen3-30b-a3b": MixtureGeometry(
        *(48, 2048, 6144, 32, 4, 128, 151936),
        rope_theta=1000000.0,
        experts=128,
        experts_per_token=8,
        expert_intermediate=768,
    ),
    "tiny-moe": MixtureGeometry(
        *(2, 64, 128, 4, 2, 16, 512),
        max_positions=2048,
        experts=8,
        experts_per_token=2,
        expert_intermediate=32,
    ),
    "qwen2.5-vl-7b": VisionGeometry(
        *(28, 3584, 18944, 28, 4, 128, 152064),
        max_positions=32768,
        rope_theta=1000000.0,
        depth=32,
        vision_hidden=1280,
        vision_intermediate=3420,
        vision_heads=16,
    ),
    "tiny-vl": VisionGeometry(
        *(2, 64, 128, 4, 2, 16, 512),
        max_positions=2048,
        depth=4,
        vision_hidden=32,
        vision_intermediate=48,
        vision_heads=2,
        window_size=56,
        first_media_id=500,
    ),
}


def _llama_config(shape: Geometry) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        **special_ids(),
    }


def geometry(name: str) -> Geometry:
    """`llama-3.1-8b`, or with fewer layers `llama-3.1-8b:4`. Raises ValueError."""
    base, colon, layers = name.partition(":")
    if base not in GEOMETRIES:
        raise ValueError(f"there is no geometry {base!r}; there are {', '.join(GEOMETRIES)}")
    if not colon:
        return GEOMETRIES[base]
    if not layers.isdigit() or int(layers) < 1:
        raise ValueError(f"{name!r}: what follows the colon is a number of layers")
    return replace(GEOMETRIES[base], layers=int(layers))


def special_ids() -> dict[str, int]:
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def write_model(folder: Path, shape: Geometry) -> Path:
    """A checkpoint folder without weights."""
    folder.mkdir(parents=True)
    _write(folder / "config.json", shape.config)
    _write(folder / "generation_config.json", special_ids())
    _write(folder / "tokenizer.json", _tokenizer(_special(shape)))
    pad, bos, eos = SPECIAL
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": pad,
            "bos_token": bos,
            "eos_token": eos,
            "model_max_length": shape.max_positions,
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": _named_tokens(shape),
        },
    )
    if isinstance(shape, VisionGeometry):
        _write(folder / "preprocessor_config.json", _image_processor(shape))
    return folder


def _special(shape: Geometry) -> dict[str, int]:
    """Tokens that stand for no text of their own, with their ids."""
    named = {token: i for i, token in enumerate(SPECIAL)}
    if isinstance(shape, VisionGeometry):
        named |= {token: shape.first_media_id + i for i, token in enumerate(MEDIA_TOKENS)}
    return named


def _named_tokens(shape: Geometry) -> dict[str, str]:
    """By which attributes a processor asks the tokenizer for them."""
    if not isinstance(shape, VisionGeometry):
        return {}
    start, end, _, image, video = MEDIA_TOKENS
    return {
        "vision_start_token": start,
        "vision_end_token": end,
        "image_token": image,
        "video_token": video,
    }


def _image_processor(shape: VisionGeometry) -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": shape.patch_size,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 4 * 28 * 28,
        "max_pixels": 16384 * 28 * 28,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _tokenizer(special: dict[str, int]) -> dict[str, Any]:
    """Byte-level, one token a byte: every text has tokens; the model's other ids have no text."""
    vocab = {token: i for i, token in enumerate((*SPECIAL, *_byte_alphabet()))} | special
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, i in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {**level, "use_regex": True},
        "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [],
        },
    }


def _byte_alphabet() -> list[str]:
    """The characters that stand for the 256 bytes in every byte-level tokenizer (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: byte for byte in printable}
    table |= {byte: 256 + i for i, byte in enumerate(others)}
    return [chr(table[byte]) for byte in range(256)]


def scratch_folder(num_bytes: int) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder, in memory where there is room for `num_bytes` and as much again."""
    roomy = MEMORY_DISK.is_dir() and shutil.disk_usage(MEMORY_DISK).free > 2 * num_bytes + (1 << 30)
    return tempfile.TemporaryDirectory(
        prefix="loramux-bench-", dir=str(MEMORY_DISK) if roomy else None
    )
