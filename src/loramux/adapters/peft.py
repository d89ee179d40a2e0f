"""A PEFT folder in, weights and a binding report out, or one refusal with every reason.

Nothing is allocated before the header has been checked against the model: names, shapes, ranks and
data types first, bytes last.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loramux.adapters.peft_config import PeftConfig, read_config
from loramux.adapters.report import BindingReport, BindingRow
from loramux.adapters.weights import AdapterWeights, LoRAPair
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


def read_adapter(
    name: str, folder: str | Path, schema: ModelSchema, config: LoRAConfig, dtype: torch.dtype
) -> tuple[AdapterWeights, BindingReport]:
    """Read the adapter in `folder` for the model that `schema` describes.

    Weights come back on the CPU in `dtype`. Raises AdapterNotFound when there is no such folder,
    AdapterRejected with every reason when it cannot be served exactly.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise AdapterNotFound(
            f"there is no adapter folder {str(folder)!r}",
            field="lora_path",
            remedy="give the folder that holds adapter_config.json",
        )
    peft_config, canonical, reasons = read_config(folder)
    path = folder / WEIGHTS_NAME
    tensors, file_reasons = _read_header(folder)
    reasons += file_reasons
    rows: list[BindingRow] = []
    if peft_config is not None and not file_reasons:
        try:
            rows, bind_reasons = _bind(peft_config, tensors, schema, config)
        except TimeoutError:
            bind_reasons = ["a pattern of adapter_config.json takes too long to match"]
        reasons += bind_reasons
    if reasons:
        raise AdapterRejected(name, reasons)
    pairs, digest, reasons = _read_tensors(path, rows, canonical, dtype)
    if reasons:
        raise AdapterRejected(name, reasons)
    ref = AdapterRef(
        name=name,
        digest=digest,
        source=str(folder),
        max_r=max(row.r for row in rows),
        num_bytes=sum(p.a.nbytes + p.b.nbytes for p in pairs.values()),
    )
    return AdapterWeights(ref, pairs), _report(ref, rows, schema)


def _report(ref: AdapterRef, rows: list[BindingRow], schema: ModelSchema) -> BindingReport:
    bound = {row.module for row in rows}
    return BindingReport(
        name=ref.name,
        digest=ref.digest,
        rows=tuple(rows),
        num_modules=len(bound),
        unadapted=tuple(m for m in schema.modules if m not in bound),
    )


def _read_header(folder: Path) -> tuple[list[_Tensor], list[str]]:
    """Names, shapes and types of the file, without reading a tensor."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickles = [n for n in PICKLE_NAMES if (folder / n).exists()]
        if pickles:
            return [], [
                f"{pickles[0]} is a pickle, which can run code when it is read; save the adapter "
                f"as {WEIGHTS_NAME} (save_pretrained does)"
            ]
        return [], [f"{WEIGHTS_NAME} is missing"]
    try:
        with safe_open(str(path), framework="pt") as file:
            keys = list(file.keys())
            slices: list[tuple[str, Any]] = [(key, file.get_slice(key)) for key in keys]
            return [_Tensor(k, tuple(s.get_shape()), str(s.get_dtype())) for k, s in slices], []
    except (SafetensorError, OSError, ValueError) as error:
        return [], [f"{WEIGHTS_NAME} is damaged or truncated: {error}"]


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


def _read_tensors(
    path: Path, rows: list[BindingRow], canonical: bytes, dtype: torch.dtype
) -> tuple[dict[str, LoRAPair], str, list[str]]:
    """Read, check, transpose and cast; the digest covers names, types, shapes and stored bytes."""
    digest = hashlib.sha256(canonical)
    halves: dict[tuple[str, str], torch.Tensor] = {}
    bad: list[str] = []
    try:
        with safe_open(str(path), framework="pt") as file:
            for row in rows:
                tensor = file.get_tensor(row.tensor).contiguous()  # as stored
                digest.update(f"{row.tensor}|{row.dtype}|{row.shape}".encode())
                digest.update(tensor.view(torch.uint8).numpy().data)
                if not bool(torch.isfinite(tensor).all()):
                    bad.append(f"{row.tensor} holds NaN or infinity")
                    continue
                half = "A" if row.tensor.endswith(".lora_A.weight") else "B"
                stored = tensor if half == "A" else tensor.t()  # [r, in] or [r, out]
                cast = stored.to(dtype=dtype).contiguous()
                if not bool(torch.isfinite(cast).all()):
                    bad.append(
                        f"{row.tensor} overflows in {dtype}; serve it with --lora-dtype float32"
                    )
                halves[row.module, half] = cast
    except (SafetensorError, OSError, ValueError) as error:
        return {}, "", [f"{WEIGHTS_NAME} is damaged or truncated: {error}"]
    if bad:
        return {}, "", _summarise(bad)
    scale = {row.module: row.scale for row in rows}
    pairs = {m: LoRAPair(halves[m, "A"], halves[m, "B"], scale[m]) for m in scale}
    return pairs, digest.hexdigest(), []
