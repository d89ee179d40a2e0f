"""The header of `adapter_model.safetensors`: what tensors there are, before any is read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loramux.adapters.weights import FileIdentity

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
MAX_HEADER_BYTES = 64 << 20  # a hundred thousand tensors have a third of it
PREFIX = "base_model.model."
FACTORS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class FileTensor:
    """One tensor of the file, `start` bytes from its beginning."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    start: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * FLOATS[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class FileModule:
    """One LoRA module of the file: its name there, without PEFT's prefix, and its factors."""

    name: str
    factors: dict[str, FileTensor]
    """By "A" and "B"; a damaged file may lack one."""

    @property
    def missing_half(self) -> str | None:
        """The reason when one is not there."""
        if len(self.factors) == 2:
            return None
        return f"{self.name} has lora_{next(iter(self.factors))} but not its other half"


def group(tensors: Iterable[FileTensor]) -> tuple[list[FileModule], list[str]]:
    """The modules that the tensors, `base_model.model.<module>.lora_A.weight`, belong to, in their
    order; and a reason for each tensor that is none of these."""
    modules: dict[str, FileModule] = {}
    reasons = []
    for tensor in tensors:
        if not tensor.key.startswith(PREFIX):
            reasons.append(f"{tensor.key} does not start with {PREFIX!r}, so it binds to nothing")
            continue
        name, factor = tensor.key[len(PREFIX) : -14], FACTORS.get(tensor.key[-14:])
        if factor is None or not name:
            reasons.append(f"{tensor.key} is no lora_A.weight or lora_B.weight")
            continue
        if name not in modules:
            modules[name] = FileModule(name, {})
        modules[name].factors[factor] = tensor
    return list(modules.values()), reasons


def read_header(folder: Path) -> tuple[list[FileTensor], FileIdentity | None, list[str]]:
    """Names, shapes, types and places of the file, without reading a tensor."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickles = [n for n in PICKLE_NAMES if (folder / n).exists()]
        if pickles:
            reason = (
                f"{pickles[0]} is a pickle, which can run code when it is read; "
                "loramux adapter convert SRC DST reads it safely, and writes " + WEIGHTS_NAME
            )
            return [], None, [reason]
        return [], None, [f"{WEIGHTS_NAME} is missing"]
    try:
        _check_length(path)
        with safe_open(str(path), framework="pt"):
            pass  # it checks more of the header than we need, and says well what is wrong
        with open(path, "rb", buffering=0) as file:
            identity = FileIdentity.of(os.fstat(file.fileno()))
            header_bytes = min(int.from_bytes(file.read(8), "little"), MAX_HEADER_BYTES)
            header = json.loads(file.read(header_bytes))
        return _tensors(header, 8 + header_bytes, identity.size), identity, []
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        return [], None, [f"{WEIGHTS_NAME} is damaged or truncated: {error}"]


def _check_length(path: Path) -> None:
    """Raise ValueError if the file says that its header is longer than a header or the file is."""
    with open(path, "rb", buffering=0) as file:
        size, stated = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
    if stated > min(MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"its header claims {stated} bytes")


def _tensors(header: dict[str, dict[str, list[int]]], base: int, size: int) -> list[FileTensor]:
    """The header's entries. Checked once more where a wrong one would read outside the file."""
    tensors = []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        tensor = FileTensor(key, tuple(entry["shape"]), str(entry["dtype"]), base + start)
        wrong = tensor.dtype in FLOATS and tensor.num_bytes != end - start
        if wrong or start < 0 or base + end > size:
            raise ValueError(f"{key} does not lie where the header says")
        tensors.append(tensor)
    return tensors
