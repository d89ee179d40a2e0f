"""A small model in half precision, adapters of many ranks, and what its logits have to be.

The weights are rounded to bfloat16 once, so engine and reference compute with the same numbers. How
far bfloat16 itself strays is measured by the reference in bfloat16: nobody can be asked for more.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loramux import LLM, LoRARequest, SamplingParams
from parity.oracle import Oracle
from tiny import save_adapter, save_model

VOCAB = 512
LAYERS = 4
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
}
SETTINGS: list[dict[str, Any]] = [{"r": r, "lora_alpha": 2 * r} for r in (4, 8, 16)]
SETTINGS += [
    {"r": 5, "lora_alpha": 9, "rank_pattern": {"o_proj": 12, "k_proj": 3}},
    {"r": 16, "lora_alpha": 24, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]},
    {"r": 13, "lora_alpha": 7, "use_rslora": True},
]
# Of the random weights. Larger ones make bfloat16's noise grow from layer to layer, until an adapter
# left out would hardly show; smaller adapters would not show either.
MODEL_FACTOR, ADAPTER_FACTOR = 0.35, 0.25
TIMES_NOISE = 3.0
Wish = dict[str, float]
"""Adapters by name, each with its scale; none: the base model."""


@dataclass
class World:
    """A saved model with its adapters, and the reference."""

    model: Path
    adapters: dict[str, Path]
    exact: Oracle

    def noise(self, wishes: Sequence[Wish]) -> float:
        """The largest error of a row of logits that bfloat16 alone makes."""
        texts = prompts(len(wishes), seed=9, shortest=40)
        wanted = [self.exact.logits(*asked) for asked in zip(texts, wishes, strict=True)]
        self._cast(torch.bfloat16)
        rounded = [self.exact.logits(*asked) for asked in zip(texts, wishes, strict=True)]
        self._cast(torch.float32)  # nothing is lost: they were rounded before
        errors = [
            row_errors(got.float(), right) for got, right in zip(rounded, wanted, strict=True)
        ]
        return float(torch.cat(errors).max())

    def _cast(self, dtype: torch.dtype) -> None:
        for parameter in self.exact.base.parameters():  # the rotary frequencies are none
            parameter.data = parameter.data.to(dtype)


def make_world(root: Path, family: str, count: int) -> World:
    """`count` adapters of all kinds in `SETTINGS`, in turn."""
    more = {"layer_types": ["full_attention"] * LAYERS} if family == "qwen3" else {}
    model = save_model(root / "model", family, **SHAPE, **more)
    adapters = {
        f"x{i}": save_adapter(model, root / f"x{i}", seed=i + 1, **SETTINGS[i % len(SETTINGS)])
        for i in range(count)
    }
    round_weights(model, MODEL_FACTOR)
    for folder in adapters.values():
        round_weights(folder, ADAPTER_FACTOR)
    return World(model, adapters, Oracle(model, adapters))


def round_weights(folder: Path, factor: float) -> None:
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.safetensors"):
        weights = {
            name: (t * factor if t.ndim == 2 else t).bfloat16().float()
            for name, t in load_file(path).items()
        }
        save_file(weights, path, metadata={"format": "pt"})


def prompts(count: int, seed: int, shortest: int = 5, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [rng.randrange(shortest, longest + 1) for _ in range(count)]
    return [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


def row_errors(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How far rows of logits [T, V] are off, relative to their size -> [T]."""
    return (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)


@dataclass
class Asker:
    """Asks an engine whose runner is a `SeenRunner`, and compares every row of logits it made."""

    llm: LLM
    world: World
    tolerance: float
    asked: int = 0

    @property
    def runner(self) -> Any:
        return self.llm.engine.runner

    def ask(self, wishes: Sequence[Wish], texts: Sequence[list[int]], count: int) -> list[Any]:
        """Answer each prompt under its wish; check the logits; return what the runner did."""
        runner, first = self.runner, self.asked
        runner.events.clear()
        runner.seen.clear()
        loras = [
            [LoRARequest(n, lora_path=str(self.world.adapters[n]), scale=s) for n, s in w.items()]
            for w in wishes
        ]
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        given = [{"prompt_token_ids": text} for text in texts]
        outputs = self.llm.generate(given, params, lora_request=loras)
        self.llm.engine.check_integrity()
        self.asked += len(wishes)
        for index, (wish, output) in enumerate(zip(wishes, outputs, strict=True)):
            seen = [s for s in runner.seen if s.sequence == first + index]
            self._compare(wish, output.prompt_token_ids, output.outputs[0].token_ids, seen)
        return list(runner.events)

    def _compare(
        self, wish: Wish, prompt: list[int], answer: list[int], seen: Sequence[Any]
    ) -> None:
        wanted = self.world.exact.logits([*prompt, *answer[:-1]], wish)  # [T, V]
        positions = [s.position for s in seen]
        assert set(positions) == set(range(len(prompt), len(prompt) + len(answer)))
        got = torch.stack([s.logits.float().cpu() for s in seen])  # [S, V]
        rows = torch.tensor(positions) - 1
        errors = row_errors(got, wanted[rows])  # [S]
        worst = int(errors.argmax())
        assert float(errors.max()) <= self.tolerance, (
            f"{wish}: position {positions[worst]} is off by {errors.max():.4f}, "
            f"{'replayed' if seen[worst].replayed else 'eager'}; allowed are {self.tolerance:.4f}"
        )
        for name in wish:  # else the test could not tell
            others = {other: scale for other, scale in wish.items() if other != name}
            without = self.world.exact.logits([*prompt, *answer[:-1]], others)  # [T, V]
            assert float(row_errors(without[rows], wanted[rows]).min()) > self.tolerance, name
