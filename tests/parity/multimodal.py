"""Tiny random checkpoints of multimodal models, and what transformers and PEFT answer on them, alone and
in fp32: the definition of right for images and sound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    BatchFeature,
    GenerationConfig,
    PreTrainedModel,
)

from parity import multimodal_families, multimodal_qwen, multimodal_sound
from parity.multimodal_families import Family
from parity.multimodal_processors import SAMPLING_RATE, load_processor, prepare, tokenizer
from parity.oracle import Composition
from tiny import EOS

FAMILIES: dict[str, Family] = {
    **multimodal_families.FAMILIES,
    **multimodal_qwen.FAMILIES,
    **multimodal_sound.FAMILIES,
}
NAMES = {
    "llava_next": "llava-next",
    "qwen2_vl": "qwen2-vl",
    "qwen2_5_vl": "qwen2.5-vl",
    "qwen3_vl": "qwen3-vl",
    "qwen2_audio": "qwen2-audio",
    "qwen2_5_omni_thinker": "qwen2.5-omni",
    "granite_speech": "granite-speech",
    "phi4_multimodal": "phi4-multimodal",
}
"""Families by transformers' name of the kind of model, where it is another."""


def chat_template(family: Family) -> str:
    """Of messages whose content is a text or a list of parts: text, image, audio."""
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    )
    for modality, prompt in family.prompts.items():
        template += f"{{% elif part['type'] == '{modality}' %}}{prompt}"
    return template + (
        "{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )


def save_model(folder: Path, name: str, seed: int = 0) -> Path:
    """A random fp32 checkpoint of the family `name` with its processor. Weights are larger than usual,
    so that tokens vary with the prompt and the media."""
    prepare()
    family = FAMILIES[name]
    processor = family.processor(tokenizer(family.tokens, family.more_tokens))
    words = processor.tokenizer  # some processors add tokens
    # Phi-4-multimodal's processor loads none of its own.
    processor.chat_template = words.chat_template = chat_template(family)
    ids = {key: words.convert_tokens_to_ids(token) for key, token in family.tokens.items()}
    settings = family.config(ids, len(words))
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(seed)
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    _enlarge(model, list(ids.values()))
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _enlarge(model: PreTrainedModel, placeholders: list[int]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any():  # some start at zero
                parameter.normal_(0, 0.3)
            elif parameter.ndim > 1:
                parameter.mul_(16.0 if "embed_tokens" in name else 6.0)
        # Hardly ever answered: without a cache they would ask for media that are not there.
        model.get_output_embeddings().weight[placeholders] = 0.0


def family_of(model_folder: Path) -> Family:
    """Pixtral-12B is a LLaVA to its configuration; for the rest the kind of model says it."""
    config = AutoConfig.from_pretrained(model_folder)
    tower = getattr(getattr(config, "vision_config", None), "model_type", "")
    kind = "pixtral" if (config.model_type, tower) == ("llava", "pixtral") else config.model_type
    return FAMILIES[NAMES.get(kind, kind)]


def load_model(model_folder: Path) -> PreTrainedModel:
    return AutoModelForMultimodalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def save_adapter(
    model_folder: Path, folder: Path, part: str, seed: int = 1, **settings: Any
) -> Path:
    """A PEFT LoRA adapter with random A and B on one part of the model, saved by PEFT itself."""
    family = family_of(model_folder)
    targets = family.parts[part]
    chosen = {"target_modules": targets} if isinstance(targets, str) else targets
    torch.manual_seed(seed)
    model = load_model(model_folder)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, **chosen, **settings})
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(0.6 + torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.normal_(0, 0.15)
    peft_model.save_pretrained(folder)
    return folder


def random_image(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    dice = np.random.default_rng(seed)
    return Image.fromarray(dice.integers(0, 256, (height, width, 3), dtype=np.uint8))


def random_audio(seed: int, seconds: float = 0.6) -> np.ndarray:
    """float32 [samples], twelve notes with silence between some."""
    dice = np.random.default_rng(seed)
    notes = np.array_split(np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE, 12)
    waves = [
        dice.choice([0.0, 0.1, 0.9]) * np.sin(2 * np.pi * dice.uniform(100, 6000) * note)
        for note in notes
    ]
    return np.concatenate(waves).astype(np.float32)


class MediaOracle:
    """transformers' eager model with PEFT's adapters; each question activates its own composition."""

    def __init__(self, model_folder: Path, adapters: dict[str, Path] | None = None):
        self.family = family_of(model_folder)
        self.processor = load_processor(model_folder)
        self.base = load_model(model_folder)
        self.base.generation_config.eos_token_id = None
        self.peft: PeftModel | None = None
        for name, path in (adapters or {}).items():
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(self.base, path, adapter_name=name)
            else:
                self.peft.load_adapter(path, adapter_name=name)
        self._scales = {
            (module, name): value
            for module in self.base.modules()
            if isinstance(module, LoraLayer)
            for name, value in module.scaling.items()
        }

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """The text of a conversation, with one placeholder for each item of media."""
        return self.processor.apply_chat_template(
            messages, self.processor.tokenizer.chat_template, add_generation_prompt=True
        )

    def inputs(
        self,
        prompt: str | list[dict[str, Any]],
        images: Sequence[Image.Image] = (),
        audio: Sequence[np.ndarray] = (),
    ) -> BatchFeature:
        """What the processor makes of one prompt, in which media stand as in `Family.prompts`."""
        media: dict[str, Any] = {}
        if images:
            media["images"] = list(images)
        if audio:
            media["audio"] = list(audio)
            if "feature_extractor" in self.processor.get_attributes():
                media["sampling_rate"] = SAMPLING_RATE
        text = prompt if isinstance(prompt, str) else self.prompt(prompt)
        made = self.processor(text=[text], **media, return_tensors="pt")
        made.pop("labels", None)  # PaliGemma's, for training
        return made

    def logits(self, inputs: BatchFeature, composition: Composition | None = None) -> torch.Tensor:
        """[T, V] for one prompt under a sum of scaled adapters; none: the base model."""
        with torch.no_grad(), self._active(composition or {}):
            return self.base(**inputs, use_cache=False).logits[0]

    def greedy(
        self, inputs: BatchFeature, count: int, composition: Composition | None = None
    ) -> list[int]:
        """`count` tokens, each by a forward over everything before; the end token is like any other."""
        tokens: list[int] = []
        for _ in range(count):
            tokens.append(int(self.logits(inputs, composition)[-1].argmax()))
            inputs = self.followed_by(inputs, tokens[-1:])
        return tokens

    def generated(
        self, inputs: BatchFeature, count: int, composition: Composition | None = None
    ) -> list[int]:
        """The same by transformers' `generate` with its cache."""
        settings = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
        with torch.no_grad(), self._active(composition or {}):
            out = self.base.generate(**inputs, generation_config=settings)  # [1, T + count]
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    def followed_by(self, inputs: BatchFeature, tokens: Sequence[int]) -> BatchFeature:
        """The inputs of the prompt and `tokens` that the model has answered."""
        more: dict[str, Any] = {"input_ids": torch.tensor([list(tokens)])}  # [1, N]
        for key, value in {"attention_mask": 1, **self.family.later}.items():
            if key in inputs:
                more[key] = torch.full_like(more["input_ids"], value)  # [1, N]
        joined = {key: torch.cat([inputs[key], more[key]], 1) for key in more}  # [1, T + N]
        return BatchFeature({**inputs, **joined})

    def _active(self, composition: Composition) -> Any:
        """A context in which the adapters of `composition` count, and only they."""
        if self.peft is None:
            return torch.no_grad()
        if not composition:
            return self.peft.disable_adapter()
        self.peft.base_model.set_adapter(list(composition))
        for (module, name), value in self._scales.items():
            module.scaling[name] = value * composition.get(name, 1.0)
        return torch.no_grad()


def generate(
    model_folder: Path,
    prompt: str | list[dict[str, Any]],
    count: int,
    images: Sequence[Image.Image] = (),
    audio: Sequence[np.ndarray] = (),
    adapter: Path | None = None,
) -> list[int]:
    """`count` greedy tokens for a prompt or a conversation, under one adapter or none."""
    oracle = MediaOracle(model_folder, {"it": adapter} if adapter else {})
    inputs = oracle.inputs(prompt, images, audio)
    return oracle.greedy(inputs, count, {"it": 1.0} if adapter else {})
