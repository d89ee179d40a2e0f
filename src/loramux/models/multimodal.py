"""Which multimodal models are served, and the language model inside such a model.

A multimodal model of transformers is a decoder like any other, encoders ("towers") with what connects
them to it, and a head. We run decoder and head ourselves, on embeddings in which media stand already:
the whole model's forward may lack `logits_to_keep`, and would encode media again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from loramux.layers.batch import Overlay

SERVED = (
    "gemma3",
    "granite_speech",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "mistral3",
    "phi4_multimodal",
    "qwen2_5_omni_thinker",
    "qwen2_5_vl",
    "qwen2_audio",
    "qwen2_vl",
    "qwen3_vl",
    "smolvlm",
)
"""`model_type`s whose encoders `models/encoders.py` knows how to call. Pixtral is a `llava`."""

REFUSED = {"paligemma": "it attends in both directions over the whole prompt"}


def language_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config` itself, or that of the part of a larger model whose answers are text."""
    if config.model_type == "qwen2_5_omni":  # its talker, which makes speech, is not served
        thinker: PreTrainedConfig = config.thinker_config
        return thinker
    return config


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether the model takes media, or has its language model as a part."""
    towers = (getattr(config, name, None) for name in ("vision_config", "audio_config"))
    return config.get_text_config() is not config or any(tower is not None for tower in towers)


def refusals(config: PreTrainedConfig, tensor_parallel_size: int) -> Iterator[str]:
    """What stands against serving the multimodal model of `config`."""
    kind = config.model_type
    if kind in REFUSED:
        yield f"{REFUSED[kind]}, which is not served yet"
    elif kind not in SERVED:
        yield f"of the multimodal models only {', '.join(SERVED)} are served"
    if tensor_parallel_size > 1:
        yield "multimodal models are not served with tensor_parallel_size > 1 yet"


def model_class(config: PreTrainedConfig) -> Any:
    """The auto class that makes the model of `config`."""
    return AutoModelForMultimodalLM if is_multimodal(config) else AutoModelForCausalLM


def attention_setting(config: PreTrainedConfig, name: str) -> str | dict[str, str]:
    """`attn_implementation` by which the decoder attends through `name`, and towers as they like."""
    if not is_multimodal(config):
        return name
    text = config.get_text_config()
    parts = [part for part in config.sub_configs if getattr(config, part, None) is text]
    return {parts[0] if parts else "": name}


@dataclass(frozen=True, slots=True)
class Language:
    """The language model inside `model`: `decoder`, called `name` there, and the output head."""

    model: PreTrainedModel
    decoder: PreTrainedModel
    name: str
    mrope: bool
    """Whether positions are counted in three dimensions."""

    layers: int
    """How many of the decoder's layers get vectors of media added behind them (Qwen3-VL)."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Language | None:
        """None where the model is nothing else."""
        if not is_multimodal(model.config):
            return None
        decoder = model.get_decoder()
        name = next(name for name, module in model.named_modules() if module is decoder)
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        vision = getattr(model.config, "vision_config", None)
        deep = getattr(vision, "deepstack_visual_indexes", None) or ()
        return cls(model, decoder, name, "mrope_section" in rope, len(deep))

    def outside(self) -> list[str]:
        """Names of the modules, each the outermost, that do not belong to the language model."""
        above = {self.name.rsplit(".", i)[0] for i in range(1, self.name.count(".") + 1)} | {""}
        head = self.model.get_output_embeddings()
        outside = [
            _join(path, name)
            for path in sorted(above)
            for name, child in self.model.get_submodule(path).named_children()
            if child is not head and _join(path, name) not in above | {self.name}
        ]
        # Phi-4 has its encoders in the decoder.
        inside = [
            _join(self.name, name)
            for name, child in self.decoder.named_children()
            if any(isinstance(module, PreTrainedModel) for module in child.modules())
        ]
        return outside + inside

    def attend_through(self, name: str) -> None:
        """Let the decoder attend through transformers' attention function `name`."""
        # By the configuration: `set_attn_implementation` would reach encoders inside the decoder.
        self.decoder.config._attn_implementation = {"": name}

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        keep: torch.Tensor | None,
        overlay: Overlay | None,
    ) -> torch.Tensor:
        """As `Attached.own_forward`."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        more: dict[str, Any] = {}
        if overlay is not None:
            ids = ids.index_fill(0, overlay.rows, 0)  # a placeholder's id may have no embedding
        x = embedding(ids)  # [T, D]
        if overlay is not None:
            rows, order = overlay.rows.sort()  # [M] each
            vectors = overlay.vectors[:, order].to(x.dtype)  # [1 + L, M, D]
            x = x.index_copy(0, rows, vectors[0])  # [T, D]
            if self.layers:
                there = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # [T]
                more["visual_pos_masks"] = there.index_fill(0, rows, True).unsqueeze(0)  # [1, T]
                more["deepstack_visual_embeds"] = list(vectors[1:])
        hidden = self.decoder(
            inputs_embeds=x.unsqueeze(0),  # [1, T, D]
            position_ids=positions.unsqueeze(-2),  # [1, T] or [3, 1, T]
            use_cache=False,
            **more,
        ).last_hidden_state[0]  # [T, D]
        logits: torch.Tensor = head(hidden if keep is None else hidden[keep])  # [B, V]
        return logits


def let_see_both_ways(model: nn.Module, whole: list[str]) -> None:
    """Let attention in the modules `whole` be as its mask says: Phi-4's encoders call themselves causal,
    which eager attention does not look at, and SDPA only where nothing is masked."""
    for name, module in model.named_modules():
        if getattr(module, "is_causal", False) is True and is_in(name, whole):
            module.is_causal = False


def is_in(name: str, whole: list[str]) -> bool:
    """Whether module `name` is one of `whole`, or inside one."""
    return any(name == one or name.startswith(f"{one}.") for one in whole)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def linears_in(model: nn.Module, whole: list[str]) -> Iterator[tuple[str, nn.Linear]]:
    """The plain linear layers of the modules `whole`, by name. A subclass may compute something else,
    and its parent may take its weight without calling it, as PyTorch's multi-head attention does."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and is_in(name, whole):
            yield name, module
