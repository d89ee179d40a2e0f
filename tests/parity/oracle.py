"""What PEFT answers, alone and in fp32: the definition of right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM


class Oracle:
    """A PEFT model with several adapters; each question activates its own composition."""

    def __init__(self, model_folder: Path, adapters: dict[str, Path]):
        self.base = AutoModelForCausalLM.from_pretrained(
            model_folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.peft: PeftModel | None = None
        for name, path in adapters.items():
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

    def logits(self, token_ids: Sequence[int], composition: dict[str, float]) -> torch.Tensor:
        """[T, V] for one sequence under a sum of scaled adapters; {} is the base."""
        ids = torch.tensor([list(token_ids)])  # [1, T]
        with torch.no_grad():
            if self.peft is None:
                return self.base(input_ids=ids).logits[0]
            if not composition:
                with self.peft.disable_adapter():
                    return self.peft(input_ids=ids).logits[0]
            self.peft.base_model.set_adapter(list(composition))
            for (module, name), value in self._scales.items():
                module.scaling[name] = value * composition.get(name, 1.0)
            return self.peft(input_ids=ids).logits[0]

    def greedy(self, prompt: Sequence[int], composition: dict[str, float], count: int) -> list[int]:
        """`count` tokens, the end token treated like any other."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens, composition)[-1].argmax()))
        return tokens[len(prompt) :]
