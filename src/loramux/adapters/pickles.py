"""`adapter_model.bin` of older PEFT, read without running code: tensors, or the reasons against it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def read_pickle(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Tensors by name, each contiguous and of its own memory, and every reason against the file.

    Only torch's `weights_only` reader is used. Storage is never larger than the file.
    """
    size = path.stat().st_size
    if reason := _packed(path, size):
        return {}, [f"{path.name} {reason}"]
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        first = (str(error).strip().splitlines() or [""])[0][:200]
        reason = f"{path.name} cannot be read with weights_only: {type(error).__name__}: {first}"
        return {}, [reason]
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        return {}, [f"{path.name} is no dictionary of tensors"]
    tensors, reasons, total = {}, [], 0
    for key, value in loaded.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
            reasons.append(f"{key[:200]} is no ordinary tensor")
        elif value.dtype not in FLOATS:
            reasons.append(
                f"{key[:200]} has dtype {value.dtype}; float32, float16 and bfloat16 are"
            )
        else:
            total += value.numel() * value.dtype.itemsize
            tensors[key] = value
    if total > size:
        reasons.append(f"{path.name} describes {total} bytes of tensors and has {size}")
    if reasons:
        return {}, reasons
    # Copies: some may be views of one storage, which safetensors does not write.
    return {key: value.detach().clone().contiguous() for key, value in tensors.items()}, []


def _packed(path: Path, size: int) -> str | None:
    """The reason against an archive that unpacks to more than it is; torch never writes such."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        return f"is damaged: {error}"
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "is a compressed archive, which torch does not write"
    if sum(entry.file_size for entry in entries) > size:
        return "describes more bytes than it has"
    return None
