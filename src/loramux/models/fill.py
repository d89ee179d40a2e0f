"""Memory for a model that has none yet, and weights into it: a rank's slices of the checkpoint, or
the same slices of a random model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from loramux.config import EngineConfig
from loramux.errors import ConfigError
from loramux.models.names import aliases_of, expert_sources
from loramux.models.shards import INNER, Part, Shards
from loramux.parallel import Stripe, all_of

ONE_FILE = "model.safetensors"
HF_FLAG = "_is_hf_initialized"  # what transformers leaves alone
INDEX = "model.safetensors.index.json"


def materialise(model: PreTrainedModel, device: str) -> None:
    """Give every parameter of `model` memory on `device`, tied ones together, and compute what is
    never read: rotary frequencies and other constants."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                empty = torch.empty_like(parameter, device=device)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=False)
            setattr(module, name, made[id(parameter)])
    text = model.config.get_text_config()
    for name, module in list(model.named_modules()):
        if name.endswith("rotary_emb"):
            kind: Callable[..., nn.Module] = type(module)
            config = getattr(module, "config", text)  # of an encoder it is another
            model.set_submodule(name, kind(config=config).to(device))
        elif buffers := dict(module.named_buffers(recurse=False)):
            for buffer, value in buffers.items():
                module._buffers[buffer] = torch.empty_like(value, device=device)
            for parameter in module.parameters(recurse=False):
                setattr(parameter, HF_FLAG, True)
            with torch.no_grad():
                _owner(model, name)._init_weights(module)


def _owner(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost model of transformers' around the module `name`, which knows its constants."""
    owner, inner = model, ""
    for part in name.split("."):
        inner = f"{inner}.{part}" if inner else part
        module = model.get_submodule(inner)
        owner = module if isinstance(module, PreTrainedModel) else owner
    return owner


@torch.no_grad()
def fill_random(model: PreTrainedModel, shards: Shards, seed: int, device: str) -> None:
    """Weights that depend on the seed alone: each rank draws the whole and keeps its part."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0 if name.endswith("bias") else 1)
            continue
        part = shards.parts.get(name)
        if part is None:
            parameter.normal_(0.0, 0.02, generator=generator)
            continue
        whole = torch.empty(part.shape, dtype=parameter.dtype, device=device)
        parameter.copy_(part.take(whole.normal_(0.0, 0.02, generator=generator)))


@torch.no_grad()
def fill_from_checkpoint(model: PreTrainedModel, shards: Shards, config: EngineConfig) -> None:
    """Read this rank's slices, and no more, from the safetensors files of `config.model`.

    Raises ConfigError when there are none, or when they lack weights or have other shapes."""
    files = CheckpointFiles(config)
    missing, odd = [], []
    for name, parameter in model.named_parameters():
        key = name.replace(INNER, ".")
        known = [key, *aliases_of(model, key)]
        try:
            if found := next((k for k in known if k in files), None):
                odd += _fill(parameter, files, found, shards.parts.get(name))
            elif sources := _matrices(model, files, known):
                odd += _fill_experts(parameter, files, sources, shards.parts.get(name))
            else:
                missing.append(key)
        except (SafetensorError, OSError) as error:
            odd.append(f"{key} cannot be read: {error}")
    files.close()
    if missing:
        odd.append(f"lacks {len(missing)} weights, {missing[0]} among them")
    if odd:
        raise ConfigError(
            f"the checkpoint {config.model!r} cannot be read in slices: {'; '.join(odd[:8])}",
            field="model",
            remedy="--tensor-parallel-size 1 lets transformers read it",
        )


def _fill(
    parameter: torch.Tensor, files: CheckpointFiles, key: str, part: Part | None
) -> list[str]:
    """Read one parameter; reasons against what is there."""
    expected = part.shape if part else tuple(parameter.shape)
    if files.shape(key) != expected:
        return [f"{key} has shape {list(files.shape(key))}, expected {list(expected)}"]
    parameter.copy_(files.read(key, part))
    return []


def _matrices(model: PreTrainedModel, files: CheckpointFiles, names: list[str]) -> list[str]:
    """Names of the matrices that a parameter is put together from, if they are there."""
    for name in names:
        sources = expert_sources(model, name)
        if sources and all(source.replace("*", "0") in files for source in sources):
            return sources
    return []


def _fill_experts(
    parameter: torch.Tensor, files: CheckpointFiles, sources: list[str], part: Part | None
) -> list[str]:
    """Read a parameter [E, ...] out of the matrices of each expert, one under the other."""
    rows = _rows_in(parameter, len(sources), part)
    columns = all_of(parameter.shape[2]) if part is None else part.stripes[2]
    reasons = []
    for expert in range(parameter.shape[0]):
        start = 0
        for source, stripe in zip(sources, rows, strict=True):
            key, piece = source.replace("*", str(expert)), Part((stripe, columns))
            if key not in files or files.shape(key) != piece.shape:
                reasons.append(f"{key} is missing, or has another shape than {list(piece.shape)}")
                continue
            target = parameter[expert, start : start + stripe.size]
            target.copy_(files.read(key, piece))
            start += stripe.size
    return reasons


def _rows_in(parameter: torch.Tensor, count: int, part: Part | None) -> list[Stripe]:
    """Of each of `count` matrices, the rows that are here."""
    if part is None:
        return [all_of(parameter.shape[1] // count)] * count
    height = part.stripes[1].whole // count
    stripes = [part.stripes[1]] + ([] if part.also is None else [part.also[1]])
    return [
        Stripe(s.start - i * height, s.stop - i * height, height) for i, s in enumerate(stripes)
    ]


class CheckpointFiles:
    """The safetensors files of a checkpoint, by the name of a tensor."""

    def __init__(self, config: EngineConfig):
        self._config = config
        self._open: dict[str, Any] = {}
        index = find_file(self._config, INDEX)
        if index is not None:
            found: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
            self._file_of = found
        elif find_file(self._config, ONE_FILE) is not None:
            self._file_of = dict.fromkeys(self._handle(ONE_FILE).keys(), ONE_FILE)
        else:
            raise ConfigError(
                f"the model {config.model!r} has no safetensors files for each rank to read its part of",
                field="model",
                remedy="convert the checkpoint, or use --tensor-parallel-size 1",
            )

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._slice(key).get_shape())

    def read(self, key: str, part: Part | None) -> torch.Tensor:
        """The tensor, or the part of it; other bytes of the file are not touched."""
        found = self._slice(key)
        tensor: torch.Tensor = part.take(found) if part else found[:]
        return tensor

    def close(self) -> None:
        self._open.clear()

    def _slice(self, key: str) -> Any:
        return self._handle(self._file_of[key]).get_slice(key)

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = find_file(self._config, file)
            if path is None:
                raise OSError(f"{file} is missing")
            self._open[file] = safe_open(path, framework="pt")
        return self._open[file]


def find_file(config: EngineConfig, file: str) -> str | None:
    """The path of a file of the checkpoint, which may have to be fetched; None if it has no such."""
    path = Path(config.model).expanduser()
    if path.exists():
        return str(path / file) if (path / file).is_file() else None
    found: str | None = cached_file(
        config.model,
        file,
        revision=config.revision,
        _raise_exceptions_for_missing_entries=False,
    )
    return found
