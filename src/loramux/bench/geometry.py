"""A model by its geometry alone, and adapters for it: folders without anybody's weights.

`write_model` writes a checkpoint folder whose weights the engine makes up (`load_format="dummy"`);
`write_adapters` writes PEFT folders by the hundred, each with other bytes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loramux.bench.case import LINEARS, linear_shapes
from loramux.bench.report import usable_cores

SPECIAL = ("<pad>", "<bos>", "<eos>")
MEMORY_DISK = Path("/dev/shm")  # files there are in the page cache by nature
ADAPTER_STD = 0.02  # a delta of about a fifth of the input: answers differ, nothing overflows


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
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
            **special_ids(),
        }


GEOMETRIES = {
    "llama-3.1-8b": Geometry(32, 4096, 14336, 32, 8, 128, 128256),
    "llama-3.1-70b": Geometry(80, 8192, 28672, 64, 8, 128, 128256),
    "tiny": Geometry(2, 64, 128, 4, 2, 16, 512, max_positions=2048),
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
    _write(folder / "tokenizer.json", _tokenizer())
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
        },
    )
    return folder


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _tokenizer() -> dict[str, Any]:
    """Byte-level, one token a byte: every text has tokens; the model's other ids have no text."""
    vocab = {token: i for i, token in enumerate((*SPECIAL, *_byte_alphabet()))}
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
            for i, token in enumerate(SPECIAL)
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


def adapter_elements(config: dict[str, Any], r: int, targets: Sequence[str] = LINEARS) -> int:
    """Numbers in one adapter of rank `r` on `targets`."""
    shapes = linear_shapes(config)
    each = sum(inputs + outputs for name, (inputs, outputs) in shapes.items() if name in targets)
    return int(config["num_hidden_layers"]) * r * each


def write_adapters(
    folder: Path,
    config: dict[str, Any],
    count: int,
    r: int,
    targets: Sequence[str] = LINEARS,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
) -> list[Path]:
    """`count` PEFT folders of random adapters, all different; alpha is twice the rank.

    Each is another window into one buffer of random numbers: what takes time is the writing alone.
    """
    import torch
    from safetensors.torch import save_file

    elements = adapter_elements(config, r, targets)
    dice = torch.Generator().manual_seed(seed)
    numbers = torch.randn(elements, generator=dice).mul_(ADAPTER_STD).to(getattr(torch, dtype))
    numbers = torch.cat((numbers, numbers))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": 2 * r,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "inference_mode": True,
    }

    def write(i: int) -> Path:
        path = folder / f"adapter-{r}-{i}"
        path.mkdir(parents=True)
        _write(path / "adapter_config.json", settings)
        # A prime step: windows of different adapters do not meet before there are very many.
        first = (i * 7919) % elements
        window = numbers[first : first + elements]
        save_file(_cut(window, config, r, targets), path / "adapter_model.safetensors")
        return path

    with ThreadPoolExecutor(min(8, usable_cores())) as pool:
        return list(pool.map(write, range(count)))


def _cut(numbers: Any, config: dict[str, Any], r: int, targets: Sequence[str]) -> dict[str, Any]:
    """PEFT's tensor names -> views of `numbers`, one after the other."""
    tensors, start = {}, 0
    for layer in range(config["num_hidden_layers"]):
        for name, (inputs, outputs) in linear_shapes(config).items():
            if name not in targets:
                continue
            block = "mlp" if name in LINEARS[4:] else "self_attn"
            prefix = f"base_model.model.model.layers.{layer}.{block}.{name}"
            for half, shape in (("A", (r, inputs)), ("B", (outputs, r))):
                end = start + shape[0] * shape[1]
                tensors[f"{prefix}.lora_{half}.weight"] = numbers[start:end].view(shape)
                start = end
    return tensors


def scratch_folder(num_bytes: int) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder, in memory where there is room for `num_bytes` and as much again."""
    roomy = MEMORY_DISK.is_dir() and shutil.disk_usage(MEMORY_DISK).free > 2 * num_bytes + (1 << 30)
    return tempfile.TemporaryDirectory(
        prefix="loramux-bench-", dir=str(MEMORY_DISK) if roomy else None
    )
