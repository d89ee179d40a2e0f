"""Classification heads: what PEFT saves beside LoRA for task_type SEQ_CLS, checked; and as tensors.

    base_model.model.score.weight [labels, D]     logits = hidden state of the prompt's last token @ W.T

A head is small and multiplies one row a prompt, so it stays in host memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from loramux.adapters.header import FLOATS, PREFIX, FileTensor
from loramux.adapters.peft_config import HEAD_NAMES, MAX_CONFIG_BYTES, PeftConfig
from loramux.adapters.weights import AdapterWeights, Stored, StoredHead
from loramux.config import LoRAConfig
from loramux.schema import ModelSchema

MODEL_CONFIG_NAME = "config.json"
MAX_LABEL_CHARS = 256
WRAPPERS = (
    ".modules_to_save.",
    ".original_module.",
)  # PEFT's own, in memory; it saves without them

Activation = Literal["softmax", "sigmoid", "none"]


@dataclass(frozen=True, slots=True)
class HeadBinding:
    """The tensors of a head in a file: `weight` [labels, D] and `bias` [labels]."""

    name: str
    weight: FileTensor
    bias: FileTensor | None
    labels: tuple[str, ...]

    @property
    def tensors(self) -> list[FileTensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def stored(self, places: Mapping[str, Stored]) -> StoredHead:
        """Where it stands, by the places of all tensors."""
        bias = None if self.bias is None else places[self.bias.key]
        return StoredHead(places[self.weight.key], bias, self.labels)


def split_heads(tensors: Iterable[FileTensor]) -> tuple[list[FileTensor], list[FileTensor]]:
    """(those of a classification head, the others)."""
    heads: list[FileTensor] = []
    others: list[FileTensor] = []
    for tensor in tensors:
        (others if _head_of(tensor) is None else heads).append(tensor)
    return heads, others


def bind_head(
    tensors: Sequence[FileTensor],
    peft: PeftConfig,
    schema: ModelSchema,
    config: LoRAConfig,
    folder: Path,
) -> tuple[HeadBinding | None, list[str]]:
    """The head that `tensors` make, if the adapter has one, or every reason against it.

    `folder` is the adapter's: a config.json there may name the labels."""
    if not tensors:
        if not peft.saved_heads:
            return None, []
        names = " or ".join(f"{name}.weight" for name in sorted(peft.saved_heads))
        return None, [f"modules_to_save has a classification head, but the file has no {names}"]
    weights = {_head_of(t): t for t in tensors if t.key.endswith(".weight")}
    biases = {_head_of(t): t for t in tensors if t.key.endswith(".bias")}
    reasons = [reason for t in tensors if (reason := _wrong(t, peft, schema))]
    if reasons:
        return None, reasons
    if len(weights) != 1 or not biases.keys() <= weights.keys():
        listed = ", ".join(sorted(t.key for t in tensors))
        return None, [f"{listed}: an adapter has one classification head, with a weight"]
    ((name, weight),) = weights.items()
    assert name is not None
    bias, count = biases.get(name), weight.shape[0]
    if bias is not None and bias.shape != (count,):
        return None, [f"{bias.key} has shape {list(bias.shape)}, expected {[count]}"]
    limit = config.max_lora_cls_labels
    if limit is not None and count > limit:
        return None, [
            f"its classification head has {count} labels, more than max_lora_cls_labels {limit}; "
            f"start with --max-lora-cls-labels {count}"
        ]
    return HeadBinding(name, weight, bias, _labels(folder, count, schema)), []


def _head_of(tensor: FileTensor) -> str | None:
    """The name of the head that a tensor is of."""
    for name in HEAD_NAMES:
        stem = PREFIX + name
        if tensor.key in (f"{stem}.weight", f"{stem}.bias"):
            return name
        if any(tensor.key.startswith(stem + wrapper) for wrapper in WRAPPERS):
            return name
    return None


def _wrong(tensor: FileTensor, peft: PeftConfig, schema: ModelSchema) -> str | None:
    name = _head_of(tensor)
    if any(wrapper in tensor.key for wrapper in WRAPPERS):
        return f"{tensor.key} is a name that PEFT does not load; write the adapter with save_pretrained"
    if name not in peft.saved_heads:
        return (
            f"{tensor.key} is in the file, but the configuration does not save it: that takes "
            f'task_type "SEQ_CLS" and modules_to_save with {name!r}'
        )
    if tensor.dtype not in FLOATS:
        return f"{tensor.key} has dtype {tensor.dtype}; F32, F16 and BF16 are served"
    if tensor.key.endswith(".bias"):
        return None
    width = schema.hidden_size
    if len(tensor.shape) != 2 or tensor.shape[0] < 1 or tensor.shape[1] != width:
        return f"{tensor.key} has shape {list(tensor.shape)}, expected [labels, {width}]"
    return None


# --- labels ----------------------------------------------------------------------------------------


def _labels(folder: Path, count: int, schema: ModelSchema) -> tuple[str, ...]:
    """Names of `count` labels: the adapter's own, the base model's if it has so many, or numbers."""
    own = _own_labels(folder / MODEL_CONFIG_NAME)
    for labels in (own, schema.labels):
        if len(labels) == count:
            return labels
    return tuple(f"LABEL_{index}" for index in range(count))


def _own_labels(path: Path) -> tuple[str, ...]:
    """What a model configuration beside the adapter calls its labels; () if there is none to read."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            return ()
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ()
    return labels_of(data.get("id2label")) if isinstance(data, dict) else ()


def labels_of(id2label: Any) -> tuple[str, ...]:
    """The names of a configuration's `id2label` in the order of their numbers; () if it is none."""
    if not isinstance(id2label, dict):
        return ()
    names = {str(number): name for number, name in id2label.items()}
    listed = [names.get(str(number)) for number in range(len(names))]
    fit = [name for name in listed if isinstance(name, str) and 0 < len(name) <= MAX_LABEL_CHARS]
    return tuple(fit) if len(fit) == len(names) else ()


# --- tensors ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """logits = hidden @ weight.T + bias. `weight` [labels, D] and `bias` [labels] are float32 with
    values that `dtype`, the model's, can hold: PEFT has a head in the model's type."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype
    labels: tuple[str, ...]
    activation: Activation

    @classmethod
    def of(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        labels: tuple[str, ...],
        activation: Activation | None = None,
    ) -> Head:
        """From tensors of any floating type, which are copied; one label is a yes or no by default."""
        return cls(
            weight.to(dtype).to(torch.float32, copy=True),
            None if bias is None else bias.to(dtype).to(torch.float32, copy=True),
            *(dtype, labels, activation or ("softmax" if len(labels) > 1 else "sigmoid")),
        )

    @property
    def is_finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in (self.weight, self.bias) if t is not None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., D] float32 -> [..., labels] float32, rounded to `dtype` as a product in it is."""
        y = torch.nn.functional.linear(hidden, self.weight, self.bias)  # [..., labels]
        return y.to(self.dtype).float()

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """[..., labels] -> [..., labels]."""
        if self.activation == "softmax":
            return logits.softmax(-1)
        return logits.sigmoid() if self.activation == "sigmoid" else logits


def head_of(weights: AdapterWeights, dtype: torch.dtype) -> Head | None:
    """The head of an adapter for a model in `dtype`, if it has one."""
    stored = weights.layout.head
    if stored is None:
        return None
    bias = None if stored.bias is None else stored.bias.view(weights.buffer).view(-1)  # [labels]
    return Head.of(stored.weight.view(weights.buffer), bias, dtype, stored.labels)
