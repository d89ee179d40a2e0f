"""Single weights of a base model's checkpoint, from its safetensors files; no model is made."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

from loramux.adapters.sources import HubRepository, parse_source
from loramux.errors import ConfigError

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class BaseWeights:
    """The checkpoint in a folder, or of a repository of the Hub. Raises ConfigError."""

    def __init__(self, model: str):
        self._folder = _folder_of(model)
        try:
            if (self._folder / INDEX).is_file():
                index = json.loads((self._folder / INDEX).read_text(encoding="utf-8"))
                self._files = {str(k): str(v) for k, v in index["weight_map"].items()}
            else:
                with safe_open(str(self._folder / ONE_FILE), framework="pt") as file:
                    self._files = dict.fromkeys(file.keys(), ONE_FILE)
        except Exception as error:
            raise ConfigError(
                f"the weights of {model!r} cannot be read: {type(error).__name__}",
                field="base",
                remedy=f"name a folder or a repository with {ONE_FILE} or {INDEX}",
            ) from error

    def find(self, name: str) -> torch.Tensor | None:
        """[out, in] float32, or None where the checkpoint has no matrix of this name."""
        if name not in self._files:
            return None
        with safe_open(str(self._folder / self._files[name]), framework="pt") as file:
            weight: torch.Tensor = file.get_tensor(name)
        return weight.float() if weight.ndim == 2 and weight.is_floating_point() else None


def _folder_of(model: str) -> Path:
    source = parse_source(model)
    if not isinstance(source, HubRepository):
        return Path(model).expanduser()
    try:
        patterns = ["model*.safetensors", INDEX]
        return Path(
            snapshot_download(source.name, revision=source.revision, allow_patterns=patterns)
        )
    except Exception as error:
        raise ConfigError(
            f"the model {model!r} cannot be fetched: {type(error).__name__}", field="base"
        ) from error
