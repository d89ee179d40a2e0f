"""What PEFT saves of a linear layer beside its two factors, checked: one vector over its outputs each.

    <layer>.lora_magnitude_vector   [out]   DoRA (`use_dora`)
    <layer>.lora_B.bias             [out]   `lora_bias`
    <layer>.base_layer.bias         [out]   `bias`: instead of the base model's, of a layer with LoRA
    <layer>.bias                    [out]   likewise, of one without, if `bias` is "all"

All come down to a gain and a shift of the layer's output, see `engine.affine`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loramux.adapters.header import FLOATS, PREFIX, FileTensor
from loramux.adapters.linears import linear_named, may_be_left_out
from loramux.adapters.peft_config import PeftConfig
from loramux.adapters.report import BindingRow, summarise
from loramux.adapters.weights import Stored, StoredVectors
from loramux.config import LoRAConfig
from loramux.schema import ModelSchema

MAGNITUDE, LORA_BIAS, BIAS = "magnitude", "lora_bias", "bias"
ENDINGS = {
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_B.bias": LORA_BIAS,
    ".base_layer.bias": BIAS,
    ".bias": BIAS,
}


@dataclass(frozen=True, slots=True)
class VectorBinding:
    """The vectors of the file, by kind, of `module` of the model."""

    module: str
    tensors: dict[str, FileTensor] = field(default_factory=dict)

    @property
    def rows(self) -> list[BindingRow]:
        return [
            BindingRow(t.key, self.module, t.shape, t.dtype, 0, 1.0) for t in self.tensors.values()
        ]

    def stored(self, places: Mapping[str, Stored]) -> StoredVectors:
        """Where they stand, by the places of all tensors."""
        return StoredVectors(**{kind: places[t.key] for kind, t in self.tensors.items()})


def split_vectors(tensors: Iterable[FileTensor]) -> tuple[list[FileTensor], list[FileTensor]]:
    """(those that are vectors of layers, the others)."""
    vectors: list[FileTensor] = []
    others: list[FileTensor] = []
    for tensor in tensors:
        (others if _parts(tensor.key) is None else vectors).append(tensor)
    return vectors, others


def bind_vectors(
    tensors: Sequence[FileTensor],
    adapted: Collection[str],
    peft: PeftConfig,
    schema: ModelSchema,
    config: LoRAConfig,
) -> tuple[list[VectorBinding], list[str]]:
    """The vectors by module; every one that cannot be served, or that is missing, is a reason.

    `adapted` are the model's modules that have LoRA in this file."""
    found: dict[str, VectorBinding] = {}
    reasons: list[str] = []
    for tensor in sorted(tensors, key=lambda t: t.key):
        parts = _parts(tensor.key)
        assert parts is not None
        name, kind, wrapped = parts
        if may_be_left_out(name, schema, config):
            continue
        spec = linear_named(name, schema)
        if spec is None:
            reasons.append(f"{tensor.key} binds to no linear layer of the model")
            continue
        if reason := _wrong(tensor, kind, wrapped, spec.name, adapted, spec.out_features, peft):
            reasons.append(reason)
            continue
        own = found.setdefault(spec.name, VectorBinding(spec.name))
        if kind in own.tensors:
            reasons.append(f"{spec.name} has two tensors for its {kind}")
        own.tensors[kind] = tensor
    of_experts = any(schema.modules[m].experts for m in adapted if m in schema.modules)
    for key, said in (("use_dora", peft.use_dora), ("lora_bias", peft.lora_bias)):
        if said and of_experts:
            reasons.append(f"{key} is not served on experts, nor does PEFT have it there")
    missing = [
        f"{key} is set, but the file has no {ending} of {module}"
        for key, kind, ending, said in (
            ("use_dora", MAGNITUDE, "lora_magnitude_vector", peft.use_dora),
            ("lora_bias", LORA_BIAS, "lora_B.bias", peft.lora_bias),
        )
        if said
        for module in sorted(adapted)
        if module in schema.modules
        and not schema.modules[module].experts
        and kind not in (found[module].tensors if module in found else {})
    ]
    return list(found.values()), summarise(reasons) + summarise(missing)


def _parts(key: str) -> tuple[str, str, bool] | None:
    """(module, kind, whether the name is that of a layer with LoRA) of a vector's key."""
    if not key.startswith(PREFIX):
        return None
    for ending, kind in ENDINGS.items():
        if key.endswith(ending) and len(key) > len(PREFIX) + len(ending):
            return key[len(PREFIX) : -len(ending)], kind, ending != ".bias"
    return None


def _wrong(
    tensor: FileTensor,
    kind: str,
    wrapped: bool,
    module: str,
    adapted: Collection[str],
    width: int,
    peft: PeftConfig,
) -> str | None:
    said = {MAGNITUDE: peft.use_dora, LORA_BIAS: peft.lora_bias, BIAS: peft.bias != "none"}
    names = {MAGNITUDE: "use_dora", LORA_BIAS: "lora_bias", BIAS: "bias"}
    if not said[kind]:
        return f"{tensor.key} is in the file, but the configuration does not set {names[kind]}"
    if kind == BIAS and not wrapped and peft.bias != "all":
        return f"{tensor.key} is in the file, but bias={peft.bias!r} is for layers with LoRA"
    if wrapped != (module in adapted):
        has = "has" if module in adapted else "has no"
        return f"{tensor.key}: PEFT does not save it so where {module} {has} LoRA"
    if tensor.dtype not in FLOATS:
        return f"{tensor.key} has dtype {tensor.dtype}; F32, F16 and BF16 are served"
    if tensor.shape != (width,):
        return f"{tensor.key} has shape {list(tensor.shape)}, expected {[width]}"
    return None
