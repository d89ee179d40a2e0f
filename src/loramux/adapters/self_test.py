"""Is what is served what the file says? The file is read a second way, and both are applied to random
activations.

    file ─ peft, weights ─▶ factors, scale ─ rounded, in pool rows ─▶ served delta ─┐
      └─── this module ───▶ factors, scale ─ float64 ──────────────▶ wanted delta ─┴▶ relative error

The second way shares no code with the first: safetensors reads the tensors, and the scale is worked out
here. LoRA of linear layers is compared, against PEFT with DoRA and the bias of lora_B on base weights of
zero; that of experts is not, nor are rows of a vocabulary and biases that replace the base model's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import regex
import torch
from safetensors import safe_open

from loramux.adapters.affine import gain_and_shift, squared_lengths
from loramux.adapters.weights import AdapterWeights, LoRAPair
from loramux.errors import AdapterRejected
from loramux.kernels import LoRASite, Segments, lora_delta

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
HALVES = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
ROWS = 8  # random activations a module
PATTERN_TIMEOUT_S = 1.0
SCALE_ERROR = 1e-12
# Largest error of a delta, as a part of its largest element, by the type it is served in.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}


class FileDeltas:
    """The LoRA of linear layers, and of the embedding, as the files of `folder` say it, by the names
    that they use."""

    method = "float64 from the file"
    has_vectors = False
    """Whether DoRA's gains and the bias of lora_B are in it, for base weights of zero."""

    def __init__(self, folder: Path):
        self._config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        self.factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            keys = set(file.keys())
            for key in sorted(keys):
                half = next((end for end in HALVES if key.endswith(end)), "")
                name = key.removeprefix(PREFIX).removesuffix(half)
                other = f"{PREFIX}{name}{HALVES.get(half, '')}"
                if half and other in keys:
                    a, b = file.get_tensor(key), file.get_tensor(other)  # [r, in], [out, r]
                    if a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]:
                        self.factors[name] = a, b

    def scale(self, name: str) -> float:
        """alpha / r, or alpha / sqrt(r), of one module."""
        r = self.factors[name][0].shape[0]
        parameters = self._config.get("target_parameters") or []
        weight = f"{name}.weight"
        if any(weight == p or weight.endswith(f".{p}") for p in parameters):
            name = weight
        alpha = float(self._config["lora_alpha"])
        for pattern, value in (self._config.get("alpha_pattern") or {}).items():
            expression = rf"(.*\.)?({pattern})$"
            if regex.match(expression, name, timeout=PATTERN_TIMEOUT_S):
                alpha = float(value)
                break
        return alpha / (math.sqrt(r) if self._config.get("use_rslora") else r)

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out], in float64."""
        a, b = self.factors[name]
        return self.scale(name) * ((x.double() @ a.double().T) @ b.double().T)  # [T, out]


def refuse_differing(weights: AdapterWeights, aliases: Mapping[str, str]) -> None:
    """Raise AdapterRejected, with every reason, where what is served is not what the file says.

    `aliases` are names that files use, to the model's own. Bits and scales are compared, and the deltas
    of random activations in float64."""
    try:
        wanted = FileDeltas(weights.source.weights_path.parent)
        reasons = _differences(weights.every_pair, wanted, aliases)
        if not weights.layout.experts:
            served = {
                aliases.get(name, name) for name in wanted.factors
            } <= weights.every_pair.keys()
            reasons += [] if served else ["self-test: the file has LoRA that is not served"]
    except Exception as error:
        reasons = [f"the self-test cannot read the files: {type(error).__name__}"]
    if reasons:
        raise AdapterRejected(weights.ref.name, reasons, remedy="load it again; report this")


def _differences(
    pairs: Mapping[str, LoRAPair], wanted: FileDeltas, aliases: Mapping[str, str]
) -> list[str]:
    reasons = []
    names = {aliases.get(name, name): name for name in wanted.factors}
    generator = torch.Generator().manual_seed(0)
    for module, pair in pairs.items():
        if (name := names.get(module)) is None:
            reasons.append(f"self-test: the file has no tensors of {module}")
            continue
        a, b = wanted.factors[name]
        if not (torch.equal(pair.a, a) and torch.equal(pair.b.t(), b)):
            reasons.append(f"self-test: {module} is not served as the file has it")
        elif not math.isclose(pair.scale, wanted.scale(name), rel_tol=SCALE_ERROR):
            reasons.append(f"self-test: {module} is served with the scale {pair.scale}")
        else:
            x = torch.randn(2, a.shape[1], generator=generator, dtype=torch.float64)  # [2, in]
            served = pair.scale * ((x @ pair.a.double().T) @ pair.b.double())  # [2, out]
            if relative_error(served, wanted.delta(name, x)) > SCALE_ERROR:
                reasons.append(f"self-test: the delta of {module} differs")
    return reasons


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, as a part of the largest element that is wanted."""
    largest = float(wanted.abs().max())
    difference = float((found.double() - wanted).abs().max())
    if math.isnan(difference):
        return math.inf
    return difference / largest if largest else (math.inf if difference else 0.0)


@dataclass(frozen=True, slots=True)
class NumericReport:
    """The relative error of each module, against what, and the bound."""

    method: str
    errors: dict[str, float]
    bound: float
    not_compared: int = 0
    """Projections of experts."""

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.errors.items(), key=lambda item: item[1], default=("", 0.0))

    @property
    def passed(self) -> bool:
        return bool(self.errors) and self.worst[1] <= self.bound

    def format(self) -> str:
        if not self.errors:
            return "no LoRA of a linear layer to compare; that of experts is not compared"
        module, error = self.worst
        lines = [
            f"deltas of {len(self.errors)} modules on random activations against {self.method}: "
            f"worst relative error {error:.2e} ({module}), bound {self.bound:.0e}: "
            f"{'passed' if self.passed else 'FAILED'}"
        ]
        if self.not_compared:
            lines.append(f"{self.not_compared} projections of experts are not compared")
        return "\n".join(lines)


def check_deltas(
    weights: AdapterWeights, aliases: Mapping[str, str], dtype: torch.dtype, wanted: Any
) -> NumericReport:
    """Run every module of `weights` in `dtype` through the op that serves it, and compare with
    `wanted`, a `FileDeltas` or `PeftDeltas`."""
    names = {aliases.get(name, name): name for name in wanted.factors}
    generator = torch.Generator().manual_seed(0)
    errors = {}
    for module, pair in weights.every_pair.items():
        x = torch.randn(ROWS, pair.a.shape[1], generator=generator)  # [T, in]
        x = x.to(dtype)  # [T, in]
        affine = _on_zero(weights, module, pair) if wanted.has_vectors else None
        found = _served_delta(pair, x, affine)  # [T, out]
        errors[module] = (
            relative_error(found, wanted.delta(names[module], x)) if module in names else math.inf
        )
    return NumericReport(wanted.method, errors, BOUNDS[dtype], len(weights.layout.experts))


def _on_zero(weights: AdapterWeights, module: str, pair: LoRAPair) -> torch.Tensor | None:
    """Gain and shift [2, out] of a module whose base weight and bias are zero, if it has any."""
    stored = weights.layout.vectors.get(module)
    if stored is None:
        return None
    a, b = pair.a, pair.b.t()  # [r, in], [out, r]
    zero = torch.zeros(1, 1).expand(len(b), a.shape[1])  # [out, in]
    squares = squared_lengths(zero, a, b, pair.scale)  # [out]
    stored = replace(stored, bias=None)  # there is none to replace
    return gain_and_shift(stored, weights.buffer, squares, torch.zeros(len(b)), pair.scale)


def _served_delta(
    pair: LoRAPair, x: torch.Tensor, affine: torch.Tensor | None = None
) -> torch.Tensor:
    """[T, in] -> [T, out]: what the serving op adds for one adapter to zeros, from pool rows in x's
    type, with its gain and shift `affine` [2, out]."""
    r, out = pair.b.shape
    site = LoRASite(
        a=pair.a.to(x.dtype).contiguous()[None],  # [1, r, in]
        b=pair.b.to(x.dtype).contiguous(),  # [r, out]
        slice_starts=(0, out),
        row_r=torch.full((1, r), r, dtype=torch.int32),
        row_scale=torch.full((1, r), pair.scale, dtype=torch.float32),
        affine=torch.zeros(2, 1, out, dtype=x.dtype)
        if affine is None
        else affine.to(x.dtype)[:, None].contiguous(),  # [2, 1, out]
    )
    segments = Segments(
        starts=torch.tensor([0], dtype=torch.int32),  # [1]
        ends=torch.tensor([len(x)], dtype=torch.int32),  # [1]
        member_offsets=torch.tensor([0, 1], dtype=torch.int32),  # [2]
        member_rows=torch.tensor([0], dtype=torch.int32),  # [1]
        member_scales=torch.tensor([1.0]),  # [1]
        num_segments=1,
        affine_rows=frozenset() if affine is None else frozenset({0}),
    )
    y = x.new_zeros(len(x), out)  # [T, out]
    lora_delta(y, x, site, segments)
    return y
