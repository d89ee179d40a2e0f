"""Adapters that cannot be served as they are, written as ones that can: pickles, and adapters whose
initialisation changed the base weights.

With A0 and B0 those of the start, W - s B0 A0 the weights that were trained upon, and A and B the
trained factors, the difference to W is s (B A - B0 A0), of rank 2r:

    s (B A - B0 A0) = s [B - B0 | B0] [A ; A - A0]

which is written. PEFT's own conversion writes [B | -B0] [A ; A0], the same in exact arithmetic; here
the small differences stand alone, so that little is lost where they are served in 16 bits.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loramux.adapters.base_weights import BaseWeights
from loramux.adapters.header import PREFIX, WEIGHTS_NAME, read_header
from loramux.adapters.initialisations import FROM_BASE, kind_of
from loramux.adapters.peft_config import CONFIG_NAME, PeftConfig, read_config
from loramux.adapters.pickles import read_pickle
from loramux.errors import AdapterExists, AdapterNotFound, AdapterRejected, InvalidField

PICKLE_NAME = "adapter_model.bin"
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
# Files beside the weights that belong to an adapter.
COMPANIONS = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"),
)

Tensors = dict[str, torch.Tensor]
Start = Callable[[str, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | str]


def convert_adapter(
    source: str, target: str, *, base: str | None = None, initial: str | None = None
) -> str:
    """Write the adapter of folder `source` as an ordinary one into `target`; what was done, in a line.

    `base` is the model that a PiSSA or OLoRA adapter was trained on, `initial` the folder of the adapter
    before training. Raises AdapterExists, AdapterNotFound, InvalidField, ConfigError, or AdapterRejected
    with every reason; then nothing is written.
    """
    folder, written = Path(source).expanduser(), Path(target).expanduser()
    if written.exists() or written.is_symlink():
        raise AdapterExists(f"{target} exists", field="DST", remedy="name a folder that does not")
    if not folder.is_dir():
        raise AdapterNotFound(f"there is no folder {source!r}", field="SRC")
    if base is not None and initial is not None:
        raise InvalidField("--base and --initial exclude each other", field="initial")
    name = folder.name
    config, data, tensors = _read(name, folder)
    kind = kind_of(data.get("init_lora_weights", True))
    if base is not None and data.get("fan_in_fan_out"):
        reason = "--base is not for base weights that lie transposed (fan_in_fan_out)"
        raise AdapterRejected(name, [f"{reason}: give --initial FOLDER"])
    said = []
    if not (folder / WEIGHTS_NAME).is_file():
        said.append(f"{PICKLE_NAME} read with weights_only")
    if start := _start(name, kind, base, initial, config):
        if data.get("use_dora"):
            reason = "use_dora: its magnitudes belong to the changed base weights"
            raise AdapterRejected(name, [reason])
        tensors = _without_start(name, tensors, config, start)
        data = _doubled(data)
        said.append(f"made a difference to the original base weights, r {config.r} -> {data['r']}")
    if not said:
        raise AdapterRejected(name, ["it is an ordinary adapter already: nothing to convert"])
    _write(folder, written, data, tensors)
    return f"wrote {written}: {len(tensors)} tensors; {'; '.join(said)}"


def _read(name: str, folder: Path) -> tuple[PeftConfig, dict[str, Any], Tensors]:
    """Configuration and tensors, checked. Raises AdapterRejected."""
    config, _, _ = found = read_config(folder)
    reasons = found[2] if config is None else []
    tensors: Tensors = {}
    if (folder / WEIGHTS_NAME).is_file():
        _, _, file_reasons = read_header(folder)
        if not file_reasons:
            tensors = load_file(folder / WEIGHTS_NAME)
    elif (folder / PICKLE_NAME).is_file():
        tensors, file_reasons = read_pickle(folder / PICKLE_NAME)
    else:
        file_reasons = [f"it has neither {WEIGHTS_NAME} nor {PICKLE_NAME}"]
    reasons += file_reasons
    if not tensors and not file_reasons:
        reasons.append("it holds no tensors")
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            reasons.append(f"{key[:200]} does not start with {PREFIX!r}")
        if not bool(tensor.isfinite().all()):
            reasons.append(f"{key[:200]} holds NaN or infinity")
    if reasons or config is None:
        raise AdapterRejected(name, reasons)
    data = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    return config, data, tensors


def _start(
    name: str, kind: str, base: str | None, initial: str | None, config: PeftConfig
) -> Start | None:
    """What gives A0 and B0 of a module; None where the base weights were not changed."""
    if initial is not None:
        if kind in ("loftq", "unknown"):
            raise AdapterRejected(name, [f"its initialisation ({kind}) cannot be taken off again"])
        return _saved_start(name, Path(initial).expanduser(), config)
    if base is not None:
        if kind not in FROM_BASE:
            reason = f"--base is for {' and '.join(sorted(FROM_BASE))}, and this adapter is neither"
            raise AdapterRejected(name, [reason])
        return _computed_start(kind, BaseWeights(base), config)
    if kind == "plain":
        return None
    wanted = "give --base MODEL" if kind in FROM_BASE else "give --initial FOLDER"
    if kind in ("loftq", "unknown"):
        wanted = "it cannot be converted"
    raise AdapterRejected(name, [f"its initialisation changed the base weights: {wanted}"])


def _saved_start(name: str, folder: Path, config: PeftConfig) -> Start:
    other, _, tensors = _read(f"{name} --initial", folder)
    same = ("r", "alpha", "use_rslora")
    if any(getattr(config, field) != getattr(other, field) for field in same):
        raise AdapterRejected(name, ["--initial has another r, lora_alpha or use_rslora"])

    def start(
        module: str, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | str:
        a0 = tensors.get(f"{PREFIX}{module}{LORA_A}")  # [r, in]
        b0 = tensors.get(f"{PREFIX}{module}{LORA_B}")  # [out, r]
        if a0 is None or b0 is None or a0.shape != a.shape or b0.shape != b.shape:
            return f"--initial has no {module} of these shapes"
        if config.r_and_scale_of(module) != other.r_and_scale_of(module):
            return f"--initial has another rank or scale of {module}"
        return a0.float(), b0.float()

    return start


def _computed_start(kind: str, weights: BaseWeights, config: PeftConfig) -> Start:
    """A0 and B0 as PEFT computes them from the base weight, up to signs that their product loses."""

    def start(
        module: str, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | str:
        weight = weights.find(f"{module}.weight")  # [out, in]
        if weight is None or weight.shape != (b.shape[0], a.shape[1]):
            return f"the base model has no {module}.weight [{b.shape[0]}, {a.shape[1]}]"
        r, scale = config.r_and_scale_of(module)
        if kind == "olora":
            q, upper = torch.linalg.qr(weight)  # [out, k], [k, in]
            a0, b0 = upper[:r], q[:, :r]  # [r, in], [out, r]
        else:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)  # [out, k], [k], [k, in]
            root = torch.sqrt(s[:r] / scale)  # [r]
            a0, b0 = root[:, None] * vh[:r], u[:, :r] * root  # [r, in], [out, r]
        if a0.shape != a.shape or not bool(a0.isfinite().all()):
            return f"{module} has no start of rank {r} that could be computed"
        signs = (a * a0).sum(1) + (b * b0).sum(0)  # [r]
        signs = torch.where(signs < 0, -1.0, 1.0)  # [r]
        return a0 * signs[:, None], b0 * signs  # [r, in], [out, r]

    return start


def _without_start(name: str, tensors: Tensors, config: PeftConfig, start: Start) -> Tensors:
    """The tensors with A and B of every module made a difference to the original base weights."""
    found, reasons = dict(tensors), []
    for key in sorted(tensors):
        if "lora_" in key and not key.endswith((LORA_A, LORA_B)):
            reasons.append(f"{key} is no factor of a linear layer: it cannot be converted")
        if not key.endswith(LORA_A):
            continue
        module = key.removeprefix(PREFIX).removesuffix(LORA_A)
        other = f"{PREFIX}{module}{LORA_B}"
        if other not in tensors:
            reasons.append(f"{module} has lora_A but not its other half")
            continue
        a, b = tensors[key].float(), tensors[other].float()  # [r, in], [out, r]
        r, scale = config.r_and_scale_of(module)
        if a.ndim != 2 or b.ndim != 2 or not (a.shape[0] == b.shape[1] == r) or scale <= 0:
            reasons.append(
                f"{module} has shapes or a scale that its configuration does not explain"
            )
            continue
        began = start(module, a, b)
        if isinstance(began, str):
            reasons.append(began)
            continue
        a0, b0 = began
        found[key] = torch.cat((a, a - a0))  # [2r, in]
        found[other] = torch.cat((b - b0, b0), dim=1)  # [out, 2r]
    if reasons:
        raise AdapterRejected(name, reasons)
    return found


def _doubled(data: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the same scales at twice the rank."""
    factor = math.sqrt(2) if data.get("use_rslora") else 2
    return data | {
        "init_lora_weights": True,
        "r": 2 * data["r"],
        "lora_alpha": factor * data["lora_alpha"],
        "rank_pattern": {k: 2 * v for k, v in (data.get("rank_pattern") or {}).items()},
        "alpha_pattern": {k: factor * v for k, v in (data.get("alpha_pattern") or {}).items()},
    }


def _write(source: Path, target: Path, data: dict[str, Any], tensors: Tensors) -> None:
    """All files at once, under the name of `target`, or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    fresh.mkdir()
    try:
        (fresh / CONFIG_NAME).write_text(json.dumps(data, indent=2, sort_keys=True))
        save_file(tensors, fresh / WEIGHTS_NAME, metadata={"format": "pt"})
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, fresh / name)
        again = load_file(fresh / WEIGHTS_NAME)
        if again.keys() != tensors.keys() or not all(
            torch.equal(again[key], tensors[key]) for key in tensors
        ):
            raise AdapterRejected(source.name, ["what was written is not what was read: disk?"])
        os.rename(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
