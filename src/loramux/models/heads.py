"""What a checkpoint says of pooling: the head of a sequence classifier, and how it means embeddings.

A classifier (`...ForSequenceClassification`) is loaded as the language model of its family, whose body
is the same, with the output head tied to the embedding: then no weight is missing or there twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from loramux.adapters.heads import Activation, Head, labels_of
from loramux.adapters.peft_config import HEAD_NAMES
from loramux.config import EngineConfig
from loramux.errors import ConfigError
from loramux.models.fill import CheckpointFiles, find_file

CLASSIFIER = "ForSequenceClassification"
ACTIVATIONS: dict[str, Activation] = {
    "regression": "none",
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
}
# Modules of sentence-transformers that embeddings here are made of.
SERVED_MODULES = {"Transformer", "Pooling", "Normalize"}
LAST_TOKEN = "lasttoken"


def is_classifier(hf_config: PreTrainedConfig) -> bool:
    """Whether the checkpoint is of a sequence classifier."""
    return any(name.endswith(CLASSIFIER) for name in hf_config.architectures or ())


def read_head(config: EngineConfig, hf_config: PreTrainedConfig, dtype: torch.dtype) -> Head | None:
    """The classification head of the checkpoint of `config`, for a model in `dtype`; None: it is no
    classifier. Raises ConfigError where it cannot be read."""
    if not is_classifier(hf_config):
        return None
    width = int(hf_config.get_text_config().hidden_size)
    labels = labels_of(hf_config.id2label) or ("LABEL_0",)
    activation = ACTIVATIONS.get(str(hf_config.problem_type))
    if config.load_format == "dummy":
        generator = torch.Generator().manual_seed(config.seed)
        weight = torch.empty(len(labels), width).normal_(0.0, 0.02, generator=generator)
        return Head.of(weight, None, dtype, labels, activation)
    tensors = _read_tensors(config)
    weight, bias = tensors["weight"], tensors.get("bias")
    if weight.shape != (len(labels), width):
        raise _unreadable(config, f"its weight has shape {list(weight.shape)}", len(labels), width)
    if bias is not None and bias.shape != (len(labels),):
        raise _unreadable(config, f"its bias has shape {list(bias.shape)}", len(labels), width)
    return Head.of(weight, bias, dtype, labels, activation)


def _read_tensors(config: EngineConfig) -> dict[str, torch.Tensor]:
    """The head's "weight" and, if there is one, "bias"."""
    try:
        files = CheckpointFiles(config)
        for name in HEAD_NAMES:
            if f"{name}.weight" in files:
                keys = [part for part in ("weight", "bias") if f"{name}.{part}" in files]
                return {part: files.read(f"{name}.{part}", None) for part in keys}
    except (ConfigError, SafetensorError, OSError) as error:
        raise ConfigError(
            f"the classification head of {config.model!r} cannot be read: {error}", field="model"
        ) from error
    raise ConfigError(
        f"the checkpoint {config.model!r} has none of "
        f"{', '.join(f'{name}.weight' for name in HEAD_NAMES)} in its safetensors files",
        field="model",
    )


def _unreadable(config: EngineConfig, why: str, count: int, width: int) -> ConfigError:
    return ConfigError(
        f"the classification head of {config.model!r} is not served: {why}, expected "
        f"{count} labels of {width}",
        field="model",
    )


def no_embeddings(config: EngineConfig) -> str | None:
    """Why embeddings of the checkpoint would not be those it was trained for, as far as files of
    sentence-transformers beside it say; None: nothing speaks against them."""
    modules = _read_json(config, "modules.json")
    if not isinstance(modules, list):
        return None
    reasons = []
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else "?"
        if kind not in SERVED_MODULES:
            reasons.append(f"its module {kind} is not served")
        elif kind == "Pooling":
            settings = _read_json(config, f"{module.get('path', '1_Pooling')}/config.json")
            modes = _pooling_modes(settings)
            if modes != [LAST_TOKEN]:
                reasons.append(f"it pools by {' and '.join(modes) or 'nothing known'}")
    if not reasons:
        return None
    return (
        f"embeddings of {config.model!r} are refused: {'; '.join(reasons)}; served is the final "
        "hidden state of the last token"
    )


def _pooling_modes(settings: Any) -> list[str]:
    """In the words of sentence-transformers."""
    if not isinstance(settings, dict):
        return []
    if (mode := settings.get("pooling_mode")) is not None:
        return [mode] if isinstance(mode, str) else [str(one) for one in mode]
    prefix = "pooling_mode_"
    return [
        key.removeprefix(prefix).removesuffix("_tokens").removesuffix("_token")
        for key, on in settings.items()
        if key.startswith(prefix) and on
    ]


def _read_json(config: EngineConfig, file: str) -> Any:
    """What is in a JSON file of the checkpoint; None if it is not there or says nothing."""
    try:
        path = find_file(config, file)
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
