"""LoRA on experts, in every layout, checked and brought into one form: A and B for each expert.

Nothing is copied: the form (`StoredExperts`) says where each element stands. One tensor may serve two
projections, as A of a fused gate_up does, or all experts, as the shared factors do.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from loramux.adapters.expert_names import (
    PARAMETERS,
    Form,
    Fused,
    Naming,
    Place,
    assign,
    names_in,
    naming,
    stems,
)
from loramux.adapters.header import FLOATS, FileModule
from loramux.adapters.peft_config import PeftConfig
from loramux.adapters.report import Binding, summarise
from loramux.adapters.weights import Stored, StoredExperts, StoredFactor
from loramux.config import LoRAConfig
from loramux.schema import ExpertsSpec, ModelSchema

REMEDIES = {
    Form.PER_EXPERT: "start with --enable-mixed-moe-lora-format",
    Form.FUSED: "start with --enable-mixed-moe-lora-format",
    Form.SHARED_OUTER: "start with --enable-moe-shared-loras or --enable-mixed-moe-lora-format",
}


@dataclass(frozen=True, slots=True)
class ExpertBinding(Binding):
    """A LoRA module of the file as a module of the model, for one expert or for all."""

    place: Place


@dataclass(slots=True)
class ExpertModules:
    """The modules of a file that are LoRA on experts."""

    placed: list[tuple[FileModule, Place]] = field(default_factory=list)
    fused: dict[str, dict[int, tuple[FileModule, Fused]]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    def __bool__(self) -> bool:
        return bool(self.placed or self.fused)

    def add(self, module: FileModule, place: Place | Fused) -> None:
        if isinstance(place, Fused):
            self.fused[place.stem][place.level] = (module, place)
        else:
            self.placed.append((module, place))


def bind_experts(
    found: ExpertModules, peft: PeftConfig, schema: ModelSchema, config: LoRAConfig
) -> tuple[list[ExpertBinding], list[str]]:
    """Give each module its projections; every module, or half of one, that has none is a reason."""
    placed, reasons = list(found.placed), []
    for layer in found.fused.values():
        choice, why = assign(layer, peft, lambda module, place: _fits(module, place, peft))
        placed += choice
        reasons += why
    bindings: list[ExpertBinding] = []
    halves = []
    for module, place in placed:
        r, scale = peft.r_and_scale_of(place.target)
        wrong = _refusals(module, place, r, peft, schema, config)
        reasons += wrong
        if module.missing_half:
            halves.append(module.missing_half)
        elif not wrong:
            a, b = module.factors["A"], module.factors["B"]
            bindings += [ExpertBinding(name, a, b, r, scale, place) for name in _modules(place)]
    places = [place for _, place in placed]
    reasons = summarise(reasons) + summarise(halves) + _not_served(places, config)
    reasons += summarise(_claimed_twice(places)) + summarise(_mixed_dtypes(bindings))
    return bindings, reasons + summarise(_forgotten(places, peft, schema))


def stored_experts(
    bindings: Iterable[ExpertBinding], stored: Mapping[str, Stored]
) -> dict[str, StoredExperts]:
    """By module, where the factors of `bindings` stand, given where each tensor does."""
    of_module: dict[str, list[ExpertBinding]] = defaultdict(list)
    for binding in bindings:
        of_module[binding.module].append(binding)
    return {module: _stored(found, stored) for module, found in of_module.items()}


def _modules(place: Place) -> list[str]:
    """The modules of the model that the factors of this place belong to."""
    parts = [place.projection]
    if place.projection == PARAMETERS[0] and not place.spec.shares_a:
        parts = ["gate_proj", "up_proj"]
    return [f"{place.spec.name}.{part}" for part in parts]


def _features(spec: ExpertsSpec, projection: str) -> tuple[int, int]:
    """(in, out)."""
    if projection == "down_proj":
        return spec.inner, spec.hidden
    return spec.hidden, 2 * spec.inner if projection == PARAMETERS[0] else spec.inner


def _shapes(place: Place, factor: str, r: int) -> list[tuple[int, ...]]:
    """Those that a factor may have."""
    count = place.spec.num_experts
    inputs, outputs = _features(place.spec, place.projection)
    if place.form is Form.FUSED:
        return [(count * r, inputs)] if factor == "A" else [(outputs, r * count)]
    matrix = (r, inputs) if factor == "A" else (outputs, r)
    if place.form is Form.PER_EXPERT:
        return [matrix]
    return [(1, *matrix), (count, *matrix)]


def _fits(module: FileModule, place: Place, peft: PeftConfig) -> bool:
    r = peft.r_of(place.target)
    return all(t.shape in _shapes(place, factor, r) for factor, t in module.factors.items())


def _refusals(
    module: FileModule,
    place: Place,
    r: int,
    peft: PeftConfig,
    schema: ModelSchema,
    config: LoRAConfig,
) -> list[str]:
    """What is wrong with the module by itself."""
    spec = place.spec
    for name in _modules(place):
        if name in spec.modules and name not in schema.modules:
            why = schema.refused.get(name) or schema.refused.get(spec.name)
            return [f"{module.name}: {why or f'no LoRA is served on {name}'}"]
    reasons = []
    for factor, tensor in module.factors.items():
        shapes = _shapes(place, factor, r)
        if tensor.dtype not in FLOATS:
            reasons.append(f"{tensor.key} has dtype {tensor.dtype}; F32, F16 and BF16 are served")
        elif tensor.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            reasons.append(
                f"{tensor.key} has shape {list(tensor.shape)}, expected {expected} for "
                f"{place.projection} of {spec.num_experts} experts with rank {r}"
            )
    if r > config.max_lora_rank:
        reasons.append(
            f"{place.target} has rank {r}, larger than max_lora_rank {config.max_lora_rank}; "
            f"start with --max-lora-rank {r}"
        )
    if not _is_targeted(place, peft):
        reasons.append(
            f"{module.name} is in the file, but the configuration does not target {place.target}"
        )
    return reasons


def _is_targeted(place: Place, peft: PeftConfig) -> bool:
    if place.form is Form.FUSED:
        return True  # or it would have no projection
    shared = place.form is Form.SHARED_OUTER
    return peft.targets(place.target) or (shared and peft.targets(place.stem))


def _not_served(places: list[Place], config: LoRAConfig) -> list[str]:
    """A reason for each layout that the deployment does not serve."""
    first: dict[Form, Place] = {}
    layers: dict[Form, set[str]] = defaultdict(set)
    for place in places:
        if not _is_served(place.form, place.spec, config):
            first.setdefault(place.form, place)
            layers[place.form].add(place.stem)
    return [
        f"LoRA on {place.stem}"
        + (f" and {len(layers[form]) - 1} more layers" if len(layers[form]) > 1 else "")
        + f" comes {form.value}, and without a setting these experts are served "
        f"{_natural(place.spec).value} only; {REMEDIES[form]}"
        for form, place in first.items()
    ]


def _natural(spec: ExpertsSpec) -> Form:
    return Form.PER_EXPERT if spec.per_expert else Form.FUSED


def _is_served(form: Form, spec: ExpertsSpec, config: LoRAConfig) -> bool:
    if spec.shares_a:
        return form is Form.FUSED  # a gate and an up with an A each have no place there
    shared = form is Form.SHARED_OUTER and config.enable_moe_shared_loras
    return form is _natural(spec) or config.enable_mixed_moe_lora_format or shared


def _claimed_twice(places: list[Place]) -> list[str]:
    """Reasons for projections that come in two layouts, or in one under two names."""
    forms: dict[str, set[Form]] = defaultdict(set)
    times: Counter[tuple[str, int | None]] = Counter()
    for place in places:
        for module in _modules(place):
            forms[module].add(place.form)
            times[module, place.expert] += 1
    reasons = [
        f"{module} comes in two layouts: {' and '.join(sorted(f.value for f in found))}"
        for module, found in forms.items()
        if len(found) > 1
    ]
    return reasons + [
        f"{module} of {'all experts' if expert is None else f'expert {expert}'} comes under two names"
        for (module, expert), count in times.items()
        if count > 1 and len(forms[module]) == 1
    ]


def _mixed_dtypes(bindings: list[ExpertBinding]) -> list[str]:
    dtypes: dict[str, set[str]] = defaultdict(set)
    for binding in bindings:
        dtypes[binding.module] |= {binding.a.dtype, binding.b.dtype}
    return [
        f"{module} mixes {' and '.join(sorted(found))}; save the adapter in one data type"
        for module, found in dtypes.items()
        if len(found) > 1
    ]


def _forgotten(places: list[Place], peft: PeftConfig, schema: ModelSchema) -> list[str]:
    """What the configuration adapts and the file lacks. An expert of which a file has nothing has no
    LoRA, as long as others of its layer have.

    Names of single experts count only if the file uses such names at all: an adapter made where the
    experts are parameters has a `gate_proj` in its configuration for the sake of other layers.
    """
    one: set[tuple[str, int | None]] = set()
    every: set[str] = set()
    used: dict[Naming, None] = {}  # a set in order
    experts = {(place.spec.name, place.expert) for place in places}
    layers = {name for name, _ in experts}
    for place in places:
        if place.form is not Form.FUSED:
            used[naming(place)] = None
        for module in _modules(place):
            one.add((module, place.expert))
            if place.expert is None:
                every.add(module)
    touched = {module for module, _ in one}
    names = []
    for spec in schema.experts.values():
        for parameter in PARAMETERS:
            modules = _modules(Place(spec, spec.name, Form.FUSED, parameter, ""))
            targets = [f"{stem}.{parameter}" for stem in stems(spec)]
            if not touched.intersection(modules):
                names += [name for name in targets if peft.targets_parameter(name)][:1]
        for style in used:
            for projection, expert, name in names_in(style, spec):
                module = f"{spec.name}.{projection}"
                there = module in every or (module, expert) in one
                there |= spec.name in layers and (spec.name, expert) not in experts
                if not there and not (expert is None and module in touched) and peft.targets(name):
                    names.append(name)
    return [
        f"the configuration targets {name}, but the file has no tensors for it" for name in names
    ]


def _stored(bindings: list[ExpertBinding], stored: Mapping[str, Stored]) -> StoredExperts:
    """The one form of `bindings`, which are all of one module and in one layout."""
    first = bindings[0]
    spec, projection = first.place.spec, first.module.rpartition(".")[2]
    inputs, outputs = _features(spec, projection)
    count = spec.num_experts
    r = np.zeros(count, np.int32)  # [E]
    scales = np.zeros(count, np.float32)  # [E]
    if first.place.form is not Form.PER_EXPERT:
        r[:], scales[:] = first.r, first.scale
    for binding in bindings:
        if binding.place.expert is not None:
            r[binding.place.expert], scales[binding.place.expert] = binding.r, binding.scale
    if first.place.form is Form.FUSED:
        a = _stacked(stored[first.a.key], count, count, first.r, inputs)
        b = _interwoven(stored[first.b.key], spec, first.r, projection)
    elif first.place.form is Form.SHARED_OUTER:
        a = _stacked(stored[first.a.key], first.a.shape[0], count, first.r, inputs)
        b = _stacked(stored[first.b.key], first.b.shape[0], count, outputs, first.r)
    else:
        by_expert = {binding.place.expert or 0: binding for binding in bindings}
        a = _scattered({e: stored[found.a.key] for e, found in by_expert.items()}, count)
        b = _scattered({e: stored[found.b.key] for e, found in by_expert.items()}, count)
    return StoredExperts(a, b, r, scales, inputs, outputs)


def _stacked(place: Stored, held: int, count: int, rows: int, columns: int) -> StoredFactor:
    """`held` matrices [rows, columns] one after another: one an expert, or one for all."""
    step = rows * columns * place.dtype.itemsize if held == count else 0
    offsets = place.offset + step * np.arange(count, dtype=np.int64)  # [E]
    return _factor(offsets, columns, 1, place)


def _interwoven(place: Stored, spec: ExpertsSpec, r: int, projection: str) -> StoredFactor:
    """B of a fused parameter [out, r*E], in whose rows the experts alternate."""
    width = r * spec.num_experts
    first, step = 0, 1
    if projection == "up_proj":
        first = 1 if spec.interleaved else spec.inner
    if projection in ("gate_proj", "up_proj") and spec.interleaved:
        step = 2
    elements = first * width + np.arange(spec.num_experts, dtype=np.int64)  # [E]
    offsets = place.offset + elements * place.dtype.itemsize  # [E]
    alternating = projection == PARAMETERS[0] and spec.interleaved
    return _factor(offsets, step * width, spec.num_experts, place, alternating)


def _scattered(places: Mapping[int, Stored], count: int) -> StoredFactor:
    """A matrix an expert, wherever it stands."""
    offsets = np.zeros(count, np.int64)  # [E]
    strides = np.zeros(count, np.int64)  # [E]
    for expert, place in places.items():
        offsets[expert], strides[expert] = place.offset, place.columns
    some = next(iter(places.values()))
    return StoredFactor(offsets, strides, np.ones(count, np.int64), some.dtype)


def _factor(
    offsets: np.ndarray,
    row_stride: int,
    column_stride: int,
    place: Stored,
    alternating: bool = False,
) -> StoredFactor:
    rows, columns = np.full(
        (2, len(offsets)), ((row_stride,), (column_stride,)), np.int64
    )  # [E] each
    return StoredFactor(offsets, rows, columns, place.dtype, alternating)
