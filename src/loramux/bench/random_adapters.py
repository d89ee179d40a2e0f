"""Random adapters for a model of which only the `config.json` is there: PEFT folders by the hundred."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loramux.bench.case import LINEARS
from loramux.bench.linears import adapter_elements, linears
from loramux.bench.report import usable_cores

ADAPTER_STD = 0.02  # a delta of about a fifth of the input: answers differ, nothing overflows


def write_adapters(
    folder: Path,
    config: dict[str, Any],
    count: int,
    r: int,
    targets: Sequence[str] = LINEARS,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    dora: bool = False,
) -> list[Path]:
    """`count` PEFT folders of random adapters, all different; alpha is twice the rank.

    On experts an adapter has two matrices a projection and expert, as PEFT saves them for models whose
    experts are linear layers: `model.layers.0.mlp.experts.0.up_proj.lora_A.weight` [r, in].

    Each is another window into one buffer of random numbers: what takes time is the writing alone. With
    `dora` they have magnitudes, all 1, as well.
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
        **({"use_dora": True} if dora else {}),
    }
    magnitudes = _magnitudes(config, targets, getattr(torch, dtype)) if dora else {}

    def write(i: int) -> Path:
        path = folder / f"adapter-{r}-{i}"
        path.mkdir(parents=True)
        content = json.dumps(settings, indent=1)
        (path / "adapter_config.json").write_text(content, encoding="utf-8")
        # A prime step: windows of different adapters do not meet before there are very many.
        first = (i * 7919) % elements
        window = numbers[first : first + elements]
        tensors = _cut(window, config, r, targets) | magnitudes
        save_file(tensors, path / "adapter_model.safetensors")
        return path

    with ThreadPoolExecutor(min(8, usable_cores())) as pool:
        return list(pool.map(write, range(count)))


def _magnitudes(config: dict[str, Any], targets: Sequence[str], dtype: Any) -> dict[str, Any]:
    """PEFT's tensor names -> the lengths that DoRA gives the outputs of a layer."""
    import torch

    return {
        f"base_model.model.{module}.lora_magnitude_vector": torch.ones(linear.outputs, dtype=dtype)
        for layer in range(config["num_hidden_layers"])
        for name, linear in linears(config).items()
        if name in targets
        for module in linear.modules(layer)
    }


def _cut(numbers: Any, config: dict[str, Any], r: int, targets: Sequence[str]) -> dict[str, Any]:
    """PEFT's tensor names -> views of `numbers`, one after the other."""
    tensors, start = {}, 0
    for layer in range(config["num_hidden_layers"]):
        for name, linear in linears(config).items():
            if name not in targets:
                continue
            for module in linear.modules(layer):
                for half, shape in (("A", (r, linear.inputs)), ("B", (linear.outputs, r))):
                    end = start + shape[0] * shape[1]
                    key = f"base_model.model.{module}.lora_{half}.weight"
                    tensors[key] = numbers[start:end].view(shape)
                    start = end
    return tensors
