"""A PEFT folder in, weights and a binding report out, or one refusal with every reason.

Nothing is allocated before the header has been checked against the model: names, shapes, ranks and
data types first, bytes last.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loramux.adapters.host_cache import HostMemory
from loramux.adapters.peft_config import CONFIG_NAME, PeftConfig, read_config
from loramux.adapters.report import BindingReport, BindingRow
from loramux.adapters.weights import (
    AdapterSource,
    AdapterWeights,
    FileIdentity,
    Layout,
    Stored,
    StoredPair,
    now_s,
    place,
)
from loramux.config import LoRAConfig
from loramux.errors import AdapterNotFound, AdapterRejected
from loramux.schema import ModelSchema, ModuleSpec
from loramux.types import AdapterRef

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
PREFIX = "base_model.model."
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHOWN = 8  # reasons of one kind that are spelled out before they are counted


@dataclass(frozen=True, slots=True)
class _Tensor:
    key: str
    shape: tuple[int, ...]
    dtype: str
    start: int  # in the file

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * FLOATS[self.dtype].itemsize


def read_adapter(
    name: str,
    folder: str | Path,
    schema: ModelSchema,
    config: LoRAConfig,
    dtype: torch.dtype,
    memory: HostMemory | None = None,
) -> tuple[AdapterWeights, BindingReport]:
    """Read the adapter in `folder` for the model that `schema` describes.

    Weights come back on the CPU as the file holds them, fit to be served in `dtype`. Raises
    AdapterNotFound when there is no such folder, AdapterRejected with every reason when it cannot
    be served exactly.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise AdapterNotFound(
            f"there is no adapter folder {str(folder)!r}",
            field="lora_path",
            remedy="give the folder that holds adapter_config.json",
        )
    begun = now_s()
    config_identity = _identity(folder / CONFIG_NAME)  # before it is read: then it is never too new
    peft_config, canonical, reasons = read_config(folder)
    tensors, identity, file_reasons = _read_header(folder)
    reasons += file_reasons
    rows: list[BindingRow] = []
    if peft_config is not None and not file_reasons:
        try:
            rows, bind_reasons = _bind(peft_config, tensors, schema, config)
        except TimeoutError:
            bind_reasons = ["a pattern of adapter_config.json takes too long to match"]
        reasons += bind_reasons
    if reasons or config_identity is None or identity is None:
        raise AdapterRejected(name, reasons or ["its files were replaced while they were read"])
    layout, stored = _lay_out(rows, {tensor.key: tensor for tensor in tensors})
    source = AdapterSource(
        folder / CONFIG_NAME, config_identity, folder / WEIGHTS_NAME, identity, layout, begun
    )
    try:
        buffer = source.read(memory or HostMemory())  # [num_bytes] uint8
    except OSError as error:
        raise AdapterRejected(name, [f"{WEIGHTS_NAME} is damaged or truncated: {error}"]) from error
    if reasons := _check_values(buffer, stored, dtype):
        raise AdapterRejected(name, reasons)
    ref = AdapterRef(
        name=name,
        digest=_digest(canonical, buffer, rows, stored),
        source=str(folder),
        max_r=max(row.r for row in rows),
        num_bytes=sum(s.rows * s.columns for s in stored.values()) * dtype.itemsize,
    )
    return AdapterWeights(ref, buffer, source), _report(ref, rows, schema)


def _identity(path: Path) -> FileIdentity | None:
    try:
        return FileIdentity.of(path.stat())
    except OSError:
        return None  # the reader of the file says why


def _report(ref: AdapterRef, rows: list[BindingRow], schema: ModelSchema) -> BindingReport:
    bound = {row.module for row in rows}
    return BindingReport(
        name=ref.name,
        digest=ref.digest,
        rows=tuple(rows),
        num_modules=len(bound),
        unadapted=tuple(m for m in schema.modules if m not in bound),
    )


def _read_header(folder: Path) -> tuple[list[_Tensor], FileIdentity | None, list[str]]:
    """Names, shapes, types and places of the file, without reading a tensor."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickles = [n for n in PICKLE_NAMES if (folder / n).exists()]
        if pickles:
            reason = (
                f"{pickles[0]} is a pickle, which can run code when it is read; save the adapter "
                f"as {WEIGHTS_NAME} (save_pretrained does)"
            )
            return [], None, [reason]
        return [], None, [f"{WEIGHTS_NAME} is missing"]
    try:
        with safe_open(str(path), framework="pt"):
            pass  # it checks more of the header than we need, and says well what is wrong
        with open(path, "rb", buffering=0) as file:
            identity = FileIdentity.of(os.fstat(file.fileno()))
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
        return _tensors(header, 8 + header_bytes, identity.size), identity, []
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        return [], None, [f"{WEIGHTS_NAME} is damaged or truncated: {error}"]


def _tensors(header: dict[str, dict[str, list[int]]], base: int, size: int) -> list[_Tensor]:
    """The header's entries. Checked once more where a wrong one would read outside the file."""
    tensors = []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        tensor = _Tensor(key, tuple(entry["shape"]), str(entry["dtype"]), base + start)
        wrong = tensor.dtype in FLOATS and tensor.num_bytes != end - start
        if wrong or start < 0 or base + end > size:
            raise ValueError(f"{key} does not lie where the header says")
        tensors.append(tensor)
    return tensors


def _bind(
    peft: PeftConfig, tensors: list[_Tensor], schema: ModelSchema, config: LoRAConfig
) -> tuple[list[BindingRow], list[str]]:
    """Give each tensor its module; every tensor that finds none is a reason."""
    if not tensors:
        return [], [f"{WEIGHTS_NAME} holds no tensor: the adapter would do nothing"]
    rows: list[BindingRow] = []
    reasons: list[str] = []
    halves: dict[str, set[str]] = {}
    for tensor in sorted(tensors, key=lambda t: t.key):
        module, half, reason = _parse_key(tensor.key, schema)
        if reason is None and tensor.dtype not in FLOATS:
            reason = f"{tensor.key} has dtype {tensor.dtype}; F32, F16 and BF16 are served"
        spec = schema.modules.get(module)
        if reason is None and spec is not None:
            reason = _check_shape(tensor, spec, half, peft, config)
        if reason is not None or spec is None:
            reasons.append(reason or f"{tensor.key} binds to no module of this model")
            continue
        halves.setdefault(module, set()).add(half)
        r = peft.r_of(module)
        rows.append(
            BindingRow(tensor.key, module, tensor.shape, tensor.dtype, r, peft.scale_of(module))
        )
    reasons = _summarise(reasons)
    reasons += [
        f"{module} has lora_{next(iter(found))} but not its other half"
        for module, found in halves.items()
        if len(found) == 1
    ][:SHOWN]
    reasons += _missing(peft, schema, set(halves))
    return rows, reasons


def _parse_key(key: str, schema: ModelSchema) -> tuple[str, str, str | None]:
    """(module, "A" or "B", reason) of `base_model.model.<module>.lora_A.weight`."""
    if not key.startswith(PREFIX):
        return "", "", f"{key} does not start with {PREFIX!r}, so it binds to nothing"
    rest = key.removeprefix(PREFIX)
    for half in ("A", "B"):
        if rest.endswith(f".lora_{half}.weight"):
            module = rest.removesuffix(f".lora_{half}.weight")
            if module in schema.modules:
                return module, half, None
            if module in schema.refused:
                return module, half, f"{key}: {schema.refused[module]}"
            return module, half, f"{key} binds to nothing: the model has no linear {module!r}"
    return "", "", f"{key} is no lora_A.weight or lora_B.weight"


def _check_shape(
    tensor: _Tensor, spec: ModuleSpec, half: str, peft: PeftConfig, config: LoRAConfig
) -> str | None:
    r = peft.r_of(spec.name)
    expected = (r, spec.in_features) if half == "A" else (spec.out_features, r)
    if r > config.max_lora_rank:
        return (
            f"{spec.name} has rank {r}, larger than max_lora_rank {config.max_lora_rank}; "
            f"start with --max-lora-rank {r}"
        )
    if tensor.shape != expected:
        return f"{tensor.key} has shape {list(tensor.shape)}, expected {list(expected)}"
    if not peft.targets(spec.name):
        return f"{tensor.key} is in the file, but the configuration does not target {spec.name}"
    return None


def _missing(peft: PeftConfig, schema: ModelSchema, bound: set[str]) -> list[str]:
    """Modules that the configuration adapts and the file forgets."""
    if not bound:
        return []
    forgotten = [m for m in schema.modules if m not in bound and peft.targets(m)]
    wanted = [m for m in schema.refused if peft.targets(m)]
    if isinstance(peft.target_modules, str) and peft.target_modules.lower() == "all-linear":
        wanted = []  # PEFT's shorthand leaves the output head out as well
    reasons = [
        f"the configuration targets {m}, but the file has no tensors for it" for m in forgotten
    ]
    return _summarise(reasons) + [f"{m}: {schema.refused[m]}" for m in wanted]


def _summarise(reasons: list[str]) -> list[str]:
    """The first few in full, then how many more."""
    if len(reasons) <= SHOWN:
        return reasons
    return [*reasons[:SHOWN], f"and {len(reasons) - SHOWN} more of the same kind"]


def _lay_out(
    rows: list[BindingRow], tensors: Mapping[str, _Tensor]
) -> tuple[Layout, dict[str, Stored]]:
    """Where everything goes in the buffer: by module, and by the tensor's key."""
    in_file = sorted((tensors[row.tensor] for row in rows), key=lambda tensor: tensor.start)
    offsets, runs = place((t.start, t.num_bytes, FLOATS[t.dtype].itemsize) for t in in_file)
    stored = {
        tensor.key: Stored(offset, tensor.shape[0], tensor.shape[1], FLOATS[tensor.dtype])
        for tensor, offset in zip(in_file, offsets, strict=True)
    }
    pairs = {}
    for row in rows:
        if row.tensor.endswith(".lora_A.weight"):
            b = row.tensor.removesuffix("A.weight") + "B.weight"
            pairs[row.module] = StoredPair(stored[row.tensor], stored[b], row.scale)
    return Layout(pairs, tuple(runs)), stored


def _check_values(
    buffer: torch.Tensor, stored: Mapping[str, Stored], dtype: torch.dtype
) -> list[str]:
    """Reasons against values that are not finite, or would not be in `dtype`.

    The extremes tell: NaN spreads into them, and rounding keeps the order of what it rounds.
    """
    bad = []
    for key in sorted(stored):
        low, high = torch.aminmax(stored[key].view(buffer))
        extremes = torch.stack((low, high))  # [2]
        if not bool(extremes.isfinite().all()):
            bad.append(f"{key} holds NaN or infinity")
        elif not bool(extremes.to(dtype).isfinite().all()):
            bad.append(f"{key} overflows in {dtype}; serve it with --lora-dtype float32")
    return _summarise(bad)


def _digest(
    canonical: bytes, buffer: torch.Tensor, rows: list[BindingRow], stored: Mapping[str, Stored]
) -> str:
    """SHA-256 over the configuration and the names, types, shapes and stored bytes of the tensors."""
    digest = hashlib.sha256(canonical)
    data = buffer.numpy().data
    for row in rows:
        place = stored[row.tensor]
        digest.update(f"{row.tensor}|{row.dtype}|{row.shape}".encode())
        digest.update(data[place.offset : place.offset + place.num_bytes])
    return digest.hexdigest()
