"""PEFT's own deltas, for the self-test: PEFT loads the adapter onto linear layers that are all zero.

The layers share one zero, so nothing of the base model's size is allocated. PEFT decides ranks, scales
and which module gets what; its layers then run in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from loramux.adapters.self_test import PREFIX, FileDeltas


class PeftDeltas:
    """As `FileDeltas`; modules that PEFT would not adapt as linear layers come from that."""

    has_vectors = True

    def __init__(self, folder: Path):
        """Raises ImportError where PEFT is not installed."""
        import peft

        self._file = FileDeltas(folder)
        self.factors = self._file.factors
        config: Any = peft.LoraConfig.from_pretrained(str(folder))
        config.task_type = config.modules_to_save = config.target_parameters = None
        config.trainable_token_indices, config.ensure_weight_tying = None, False
        config.init_lora_weights = True  # what it sets is overwritten
        config.alora_invocation_tokens = None  # activations have no tokens
        if not isinstance(config.target_modules, str) or config.target_modules == "all-linear":
            config.target_modules = set(self.factors)
            config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        model = peft.PeftModel(self._zeros(), config)
        state = peft.utils.save_and_load.load_peft_weights(str(folder), device="cpu")
        own = set(peft.get_peft_model_state_dict(model))
        peft.set_peft_model_state_dict(model, {k: v for k, v in state.items() if k in own})
        self._model = model.double().eval()
        self._adapted = {
            name
            for name in self.factors
            if {f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"}
            <= own & set(state)
        }
        self.method = f"PEFT {peft.__version__}"
        if others := len(self.factors) - len(self._adapted):
            self.method += f" ({others} modules: {FileDeltas.method})"

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out], in float64."""
        if name not in self._adapted:
            return self._file.delta(name, x)
        with torch.inference_mode():
            output: torch.Tensor = self._model.get_submodule(PREFIX + name)(x.double())  # [T, out]
        return output

    def _zeros(self) -> nn.Module:
        """A tree of linear layers under the names that the file uses."""
        root = nn.Module()
        zero = torch.zeros(1, 1)  # [1, 1]
        for name, (a, b) in self.factors.items():
            parent = root
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            linear = nn.Linear(a.shape[1], b.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(zero.expand(b.shape[0], a.shape[1]), requires_grad=False)
            parent.add_module(leaf, linear)
        return root
