"""Which tensors of a file are LoRA on experts, in what layout, and on which projection.

    per expert    <experts>.5.gate_proj.lora_A.weight          A [r, in]        B [out, r]
    fused         <experts>.lora_A.weight                      A [E*r, in]      B [out, r*E]
                  <experts>.base_layer.lora_A.weight
    shared outer  <experts>.w1.lora_A.weight                   A [1, r, in]     B [E, out, r]

`<experts>` is the model's name or an older one of the same; `w1`, `w3` and `w2` are gate, up and down.
The names of the fused layout do not tell the parameter. PEFT wraps the module once for each parameter
that `target_parameters` names, in the order in which the module has them, which is gate_up_proj first:
with both, `base_layer` is gate_up_proj's; with one, there is no `base_layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from loramux.adapters.header import FileModule
from loramux.adapters.peft_config import PeftConfig
from loramux.schema import ExpertsSpec, ModelSchema

STYLES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
PROJECTIONS = STYLES[0]
PARAMETERS = ("gate_up_proj", "down_proj")  # in the order in which modules have them
WRAPPED = ".base_layer"

_LEAVES = {
    leaf: (style, PROJECTIONS[index])
    for style, leaves in enumerate(STYLES)
    for index, leaf in enumerate(leaves)
}


class Form(Enum):
    """A layout, in the words of a refusal."""

    PER_EXPERT = "per expert (2-D)"
    FUSED = "fused over the experts (3-D, target_parameters)"
    SHARED_OUTER = "shared outer (3-D, one A or B for all experts)"


@dataclass(frozen=True, slots=True)
class Place:
    """What a module of the file is to the model. `projection` is one of PROJECTIONS, or, in the fused
    layout, one of PARAMETERS."""

    spec: ExpertsSpec
    stem: str
    """The experts' name in the file."""
    form: Form
    projection: str
    target: str
    """The name that PEFT targets and looks up in its patterns: of a module or of a parameter."""
    expert: int | None = None
    """None: all of them."""


@dataclass(frozen=True, slots=True)
class Fused:
    """A module of the fused layout whose parameter is not known yet: `level` wrappers inside."""

    spec: ExpertsSpec
    stem: str
    level: int


@dataclass(frozen=True, slots=True)
class Naming:
    """How a file names modules of experts: by which of the names, in which style, one by one or not."""

    position: int
    style: int
    form: Form


class ExpertNames:
    """The names that `schema` gives to experts, with their aliases."""

    def __init__(self, schema: ModelSchema) -> None:
        self._specs = {stem: spec for spec in schema.experts.values() for stem in stems(spec)}

    def find(self, name: str) -> Place | Fused | str | None:
        """What the module `name` of a file is; a string: why it is nothing; None: not of experts."""
        unwrapped, level = name, 0
        while unwrapped.endswith(WRAPPED):
            unwrapped, level = unwrapped.removesuffix(WRAPPED), level + 1
        if spec := self._specs.get(unwrapped):
            return Fused(spec, unwrapped, level)
        stem, _, leaf = name.rpartition(".")
        if spec := self._specs.get(stem):
            if leaf not in _LEAVES:
                return f"{stem} has no {leaf!r} that an adapter can name"
            return Place(spec, stem, Form.SHARED_OUTER, _LEAVES[leaf][1], name)
        stem, _, index = stem.rpartition(".")
        if spec := self._specs.get(stem):
            if leaf not in _LEAVES:
                return f"an expert of {stem} has no {leaf!r}"
            if not _is_index(index, spec.num_experts):
                last = spec.num_experts - 1
                return f"{stem} has {spec.num_experts} experts, 0 to {last}, and no {index[:40]!r}"
            return Place(spec, stem, Form.PER_EXPERT, _LEAVES[leaf][1], name, int(index))
        return None


def stems(spec: ExpertsSpec) -> tuple[str, ...]:
    """Every name that a file may have for these experts, the model's own first."""
    return (spec.name, *spec.aliases)


def naming(place: Place) -> Naming:
    leaf = place.target.rpartition(".")[2]
    return Naming(stems(place.spec).index(place.stem), _LEAVES[leaf][0], place.form)


def names_in(style: Naming, spec: ExpertsSpec) -> Iterator[tuple[str, int | None, str]]:
    """(projection, expert, name in the file) of all modules that `spec` has under this naming."""
    if style.position >= len(stems(spec)):
        return
    stem = stems(spec)[style.position]
    for projection, leaf in zip(PROJECTIONS, STYLES[style.style], strict=True):
        if style.form is Form.SHARED_OUTER:
            yield projection, None, f"{stem}.{leaf}"
        else:
            for expert in range(spec.num_experts):
                yield projection, expert, f"{stem}.{expert}.{leaf}"


def assign(
    found: Mapping[int, tuple[FileModule, Fused]],
    peft: PeftConfig,
    fits: Callable[[FileModule, Place], bool],
) -> tuple[list[tuple[FileModule, Place]], list[str]]:
    """The parameters of one layer's fused modules, by level, and a reason for each that has none.

    PEFT's order decides, unless the shapes fit another order only.
    """
    some = next(iter(found.values()))[1]
    targeted = [p for p in PARAMETERS if peft.targets_parameter(f"{some.stem}.{p}")]
    if len(found) > len(targeted) or max(found) >= len(targeted):
        wanted = " and ".join(targeted) or "none"
        return [], [
            f"{module.name} is in the file, but of the parameters of {some.stem} the configuration "
            f"targets {wanted}"
            for module, _ in found.values()
        ]
    orders = [targeted[::-1], targeted]  # by level: the wrapper of the first parameter is innermost
    choices = [
        [
            (
                module,
                Place(
                    fused.spec,
                    fused.stem,
                    Form.FUSED,
                    order[level],
                    f"{fused.stem}.{order[level]}",
                ),
            )
            for level, (module, fused) in found.items()
        ]
        for order in orders
    ]
    for choice in choices:
        if all(fits(module, place) for module, place in choice):
            return choice, []
    return choices[0], []


def known_experts(schema: ModelSchema) -> str:
    """What the model has, for a refusal."""
    if not schema.experts:
        return "this model has no experts"
    first, *more = schema.experts.values()
    also = f" and {len(more)} more layers of experts" if more else ""
    return (
        f"this model has {first.name}{also}, with {first.num_experts} experts of "
        f"{first.hidden} -> {first.inner} -> {first.hidden}"
    )


def _is_index(text: str, count: int) -> bool:
    return (
        text.isascii()
        and text.isdecimal()
        and len(text) < 7
        and str(int(text)) == text
        and (int(text) < count)
    )
