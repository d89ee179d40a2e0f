"""Adapters with parts of the vocabulary as PEFT makes them, and what PEFT answers with them, in fp32."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

ADDED = 3


def save_vocabulary(
    model_folder: Path,
    folder: Path,
    seed: int,
    resize: int | None = None,
    strength: float = 0.2,
    **settings: Any,
) -> Path:
    """A random adapter, saved by PEFT itself. `resize`: tokens of the vocabulary it is trained with;
    `strength`: standard deviation of its LoRA.

    Of full copies a few rows are trained, and those that were added."""
    settings.setdefault("target_modules", ["q_proj", "down_proj"])
    torch.manual_seed(seed)
    dice = random.Random(seed)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    base = int(model.config.vocab_size)
    if resize is not None:
        model.resize_token_embeddings(resize, mean_resizing=False)
    made = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, **settings))
    size = resize or base
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, strength)
            elif "trainable_tokens" in name:
                parameter.normal_(0, 1)
            elif "modules_to_save" in name:
                trained = dice.sample(range(min(size, base)), 7)
                parameter[trained] = torch.randn(7, parameter.shape[1])
        for parameter in {made.get_input_embeddings(), made.get_output_embeddings()}:
            weight = parameter.weight
            if len(weight) > base:
                weight[base:].normal_(0, 1)
    made.save_pretrained(folder)
    return folder


class VocabularyOracle:
    """PEFT, with one adapter a model: of modules that are saved whole only one can be active."""

    def __init__(self, model_folder: Path):
        self._folder = model_folder
        self._models: dict[Path | None, Any] = {}

    def model(self, adapter: Path | None, size: int = 0) -> Any:
        """`size`: tokens of the vocabulary that `adapter` was trained with; 0: the model's."""
        if adapter not in self._models:
            base = AutoModelForCausalLM.from_pretrained(
                self._folder, dtype=torch.float32, attn_implementation="eager"
            )
            if size not in (0, base.config.vocab_size):
                base.resize_token_embeddings(size, mean_resizing=False)
            model = base if adapter is None else PeftModel.from_pretrained(base, adapter)
            self._models[adapter] = model.eval()
        return self._models[adapter]

    def logits(self, adapter: Path | None, tokens: Sequence[int], size: int = 0) -> torch.Tensor:
        """[T, V] of one sequence."""
        with torch.no_grad():
            ids = torch.tensor([list(tokens)])  # [1, T]
            return self.model(adapter, size)(input_ids=ids).logits[0]  # [T, V]

    def greedy(
        self, adapter: Path | None, prompt: Sequence[int], count: int, size: int = 0
    ) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(adapter, tokens, size)[-1].argmax()))
        return tokens[len(prompt) :]

    def hidden(self, adapter: Path | None, prompt: Sequence[int], size: int = 0) -> torch.Tensor:
        """The final hidden state [D] of the last token."""
        with torch.no_grad():
            model = copy.copy(self.model(adapter, size))
            inner = model.base_model.model if isinstance(model, PeftModel) else model
            return inner.model(input_ids=torch.tensor([list(prompt)])).last_hidden_state[0, -1]
