"""LoRA on linear layers, checked: names, shapes, ranks and data types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from loramux.adapters.expert_names import stems
from loramux.adapters.header import FLOATS, FileModule, FileTensor
from loramux.adapters.peft_config import PeftConfig
from loramux.adapters.report import Binding, summarise
from loramux.config import LoRAConfig
from loramux.schema import ModelSchema, ModuleSpec

ROUTERS = ("gate", "router")


def linear_named(name: str, schema: ModelSchema) -> ModuleSpec | None:
    """The linear layer that a file calls `name`."""
    spec = schema.modules.get(name) or schema.modules.get(schema.aliases.get(name, ""))
    return spec if spec is not None and not spec.experts else None


def unbound(tensor: FileTensor, module: FileModule, why: str | None, schema: ModelSchema) -> str:
    """The reason against a tensor that is of no module that may have LoRA."""
    name = schema.aliases.get(module.name, module.name)
    while name:  # what stands against a module stands against all inside
        if name in schema.refused:
            return f"{tensor.key}: {schema.refused[name]}"
        name = name.rpartition(".")[0]
    return f"{tensor.key} binds to nothing: {why or f'the model has no linear {module.name!r}'}"


def may_be_left_out(name: str, schema: ModelSchema, config: LoRAConfig) -> bool:
    """Whether an adapter may be served without the module that a file calls `name`: it is of a tower
    or a connector, is not served, and `allow_partial_adapters` is set."""
    name = schema.aliases.get(name, name)
    while name and name not in schema.refused:
        name = name.rpartition(".")[0]
    return config.allow_partial_adapters and name in schema.towers


def bind_linears(
    found: Iterable[tuple[FileModule, ModuleSpec]],
    peft: PeftConfig,
    schema: ModelSchema,
    config: LoRAConfig,
) -> tuple[list[Binding], list[str]]:
    """Both factors of each module; every module, or half of one, that cannot be served is a reason."""
    bindings: list[Binding] = []
    reasons: list[str] = []
    halves: list[str] = []
    for module, spec in found:
        weight = f"{module.name}.weight"
        target = weight if peft.targets_parameter(weight) else module.name
        r, scale = peft.r_and_scale_of(target)
        is_targeted = target == weight or peft.targets(target)
        if target == weight and spec.transposed:  # its A and B would change places
            reasons.append(
                f"target_parameters name {weight}, which a Conv1D layer holds transposed; "
                "LoRA on such layers is served through target_modules"
            )
        for factor, tensor in module.factors.items():
            if reason := _wrong(tensor, spec, factor, r, is_targeted, config):
                reasons.append(reason)
        if module.missing_half:
            halves.append(module.missing_half)
        else:
            a, b = module.factors["A"], module.factors["B"]
            bindings.append(Binding(spec.name, a, b, r, scale))
    times = Counter(binding.module for binding in bindings)
    twice = [f"{module} comes under two names" for module, count in times.items() if count > 1]
    return bindings, summarise(reasons) + summarise(halves) + summarise(twice)


def forgotten_linears(
    bound: Collection[str], peft: PeftConfig, schema: ModelSchema, config: LoRAConfig
) -> list[str]:
    """Linear layers that the configuration adapts and the file lacks, or the model refuses."""
    names: dict[str, list[str]] = {}
    for alias, module in schema.aliases.items():
        names.setdefault(module, [module]).append(alias)
    there = set(bound)
    routers = _routers(schema)
    lenient = routers if routers.isdisjoint(there) else set[str]()

    def is_targeted(module: str) -> bool:
        return any(
            peft.targets_parameter(f"{name}.weight")
            or (module not in lenient and peft.targets(name))
            for name in names.get(module, [module])
        )

    missing = [
        f"the configuration targets {name}, but the file has no tensors for it"
        for name, spec in schema.modules.items()
        if name not in there and not spec.experts and is_targeted(name)
    ]
    refused = []
    if not peft.targets_all_linear:  # PEFT's shorthand leaves the output head out as well
        inside = {stem for spec in schema.experts.values() for stem in stems(spec)}
        refused = [
            f"{name}: {reason}"
            for name, reason in schema.refused.items()
            if name.rpartition(".")[0] not in inside
            and not may_be_left_out(name, schema, config)
            and is_targeted(name)
        ]
    return summarise(missing) + refused


def _routers(schema: ModelSchema) -> set[str]:
    """Modules beside experts that were linear layers in older models and are not in newer ones: a
    configuration that names them among others may have had none to adapt."""
    parents = {name.rpartition(".")[0] for name in schema.experts}
    return {f"{parent}.{leaf}" for parent in parents for leaf in ROUTERS}


def _wrong(
    tensor: FileTensor,
    spec: ModuleSpec,
    factor: str,
    r: int,
    is_targeted: bool,
    config: LoRAConfig,
) -> str | None:
    expected = (r, spec.in_features) if factor == "A" else (spec.out_features, r)
    if tensor.dtype not in FLOATS:
        return f"{tensor.key} has dtype {tensor.dtype}; F32, F16 and BF16 are served"
    if r > config.max_lora_rank:
        return (
            f"{spec.name} has rank {r}, larger than max_lora_rank {config.max_lora_rank}; "
            f"start with --max-lora-rank {r}"
        )
    if tensor.shape != expected:
        return f"{tensor.key} has shape {list(tensor.shape)}, expected {list(expected)}"
    if not is_targeted:
        return f"{tensor.key} is in the file, but the configuration does not target {spec.name}"
    return None
