"""What PEFT answers, alone and in fp32: the definition of right."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from loramux import LoRARequest
from tiny import VOCAB, save_adapter, save_model

Composition = dict[str, float]
"""Adapters by name, each with its scale; none: the base model."""


class Oracle:
    """A PEFT model with several adapters; each question activates its own composition."""

    def __init__(self, model_folder: Path, adapters: dict[str, Path]):
        self.base = AutoModelForCausalLM.from_pretrained(
            model_folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.peft: PeftModel | None = None
        # PEFT overwrites the base model's biases with trained ones: such adapters get a model each.
        self._alone = {}
        if len(adapters) > 1:
            alone = [name for name, path in adapters.items() if _trains_biases(path)]
            self._alone = {name: Oracle(model_folder, {name: adapters[name]}) for name in alone}
        for name, path in adapters.items():
            if name in self._alone:
                continue
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
        if len(composition) == 1 and (name := next(iter(composition))) in self._alone:
            return self._alone[name].logits(token_ids, composition)
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


def _trains_biases(path: Path) -> bool:
    return json.loads((path / "adapter_config.json").read_text()).get("bias", "none") != "none"


def make_case(
    root: Path,
    family: str,
    adapters: dict[str, dict[str, Any]],
    compositions: Sequence[Composition],
    longest: int,
    count: int,
) -> tuple[Path, dict[str, Path], list[list[int]], list[list[int]], Oracle]:
    """A tiny model, its adapters, prompts of up to `longest` tokens, PEFT's `count` tokens for each
    composition, and PEFT itself."""
    model = save_model(root / "model", family)
    paths = {
        name: save_adapter(model, root / name, seed=seed + 1, **settings)
        for seed, (name, settings) in enumerate(adapters.items())
    }
    dice = random.Random(5)
    prompts = [
        [dice.randrange(3, VOCAB) for _ in range(dice.randrange(5, longest))] for _ in compositions
    ]
    oracle = Oracle(model, paths)
    expected = [oracle.greedy(p, c, count) for p, c in zip(prompts, compositions, strict=True)]
    return model, paths, prompts, expected, oracle


def requests_for(
    paths: dict[str, Path], compositions: Sequence[Composition]
) -> list[list[LoRARequest]]:
    return [
        [LoRARequest(name, 1, str(paths[name]), scale=scale) for name, scale in c.items()]
        for c in compositions
    ]


def assert_logprobs_equal(
    answer: Any, prompt: Sequence[int], composition: Composition, oracle: Oracle
) -> None:
    """Those of a greedy answer, which must have some, are PEFT's."""
    tokens = [*prompt, *answer.token_ids]
    wanted = oracle.logits(tokens[:-1], composition).log_softmax(-1)[len(prompt) - 1 :]
    assert len(answer.logprobs) == len(answer.token_ids)
    for step, entry in enumerate(answer.logprobs):
        for token, item in entry.items():
            assert item.logprob == pytest.approx(float(wanted[step, token]), abs=2e-3)
        assert entry[answer.token_ids[step]].rank == 1
