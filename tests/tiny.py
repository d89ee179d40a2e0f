"""Tiny random checkpoints and PEFT adapters for the tests, written as real folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteSWAConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)


@dataclass(frozen=True)
class TinyWorld:
    """Folders of a tiny model and its adapters a, b, c, d (all different, ranks 4, 8, 2, 4)."""

    model: Path
    adapters: dict[str, Path]


VOCAB = 320
EOS = 2
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": EOS,
    "bos_token_id": 1,
    "pad_token_id": 0,
}

FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**COMMON),
    "llama-bias": lambda: LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=16),
    "mistral": lambda: MistralConfig(**{**COMMON, "sliding_window": 24}),
    "gemma3": lambda: Gemma3TextConfig(
        **{**COMMON, "num_hidden_layers": 7, "sliding_window": 16, "head_dim": 16}
    ),
    "phi3": lambda: Phi3Config(**COMMON),
    "granite-swa": lambda: GraniteSWAConfig(  # attention sinks
        **COMMON, sliding_window=16, head_dim=16, attention_multiplier=0.25
    ),
}

EXPERTS: dict[str, Any] = {
    "gpt-oss": lambda: GptOssConfig(
        **{**COMMON, "num_hidden_layers": 4, "sliding_window": 16, "head_dim": 32},
        **{"num_local_experts": 4, "num_experts_per_tok": 2},
        rope_parameters={
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "truncate": False},
            **{"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 32},
        },
    ),
}

TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt_oss": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
DEFAULT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, one token a byte: every text has tokens and every token has text."""
    special = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {**special, **{c: i + len(special) for i, c in enumerate(alphabet)}}
    vocab |= {f"<extra_{i}>": i for i in range(len(vocab), VOCAB)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.chat_template = TEMPLATE
    return fast


def save_model(folder: Path, family: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """A random fp32 checkpoint with a tokenizer. Weights are larger than usual, so tokens vary."""
    config = {**FAMILIES, **EXPERTS}[family]()
    for key, value in overrides.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(0, 2)
            elif parameter.ndim > 1 and "bias" not in name:
                parameter.mul_(4.0 if "embed" not in name and "lm_head" not in name else 2.0)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_adapter(model_folder: Path, folder: Path, seed: int = 1, **settings: Any) -> Path:
    """A PEFT LoRA adapter with random A and B (B is not zero), saved by PEFT itself."""
    family = json.loads((model_folder / "config.json").read_text())["model_type"]
    settings.setdefault("target_modules", TARGETS.get(family, DEFAULT_TARGETS))
    settings.setdefault("r", 4)
    settings.setdefault("lora_alpha", 8)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(0.6 + torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.normal_(0, 0.15)
            elif settings.get("bias", "none") != "none" and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    peft_model.save_pretrained(folder)
    return folder


def make_world(root: Path) -> TinyWorld:
    model = save_model(root / "model")
    ranks = {"a": 4, "b": 8, "c": 2, "d": 4}
    adapters = {
        name: save_adapter(model, root / name, seed=i + 1, r=r)
        for i, (name, r) in enumerate(ranks.items())
    }
    return TinyWorld(model, adapters)
