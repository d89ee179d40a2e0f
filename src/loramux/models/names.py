"""How checkpoints of a model call its parameters, where transformers calls them something else.

All of it is read off transformers' own conversion mapping, by which it loads such checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)


def _conversions(model: PreTrainedModel) -> list[Any]:
    return list(get_checkpoint_conversion_mapping(model.config.model_type) or ())


def _of_experts(model: PreTrainedModel) -> Iterator[tuple[str, list[str]]]:
    """(end of a parameter's name, ends of the names of what it is put together from, `*` for the
    number of an expert)."""
    for conversion in _conversions(model):
        if not isinstance(conversion, WeightConverter) or len(conversion.target_patterns) != 1:
            continue
        if any(isinstance(operation, MergeModulelist) for operation in conversion.operations):
            yield conversion.target_patterns[0], list(conversion.source_patterns)


def has_a_matrix_an_expert(model: PreTrainedModel) -> bool:
    """Whether checkpoints of this model have a matrix an expert, which transformers puts together."""
    return any(target.endswith("gate_up_proj") for target, _ in _of_experts(model))


def expert_sources(model: PreTrainedModel, name: str) -> list[str]:
    """Names, with `*` for an expert, of the matrices that the parameter `name` [E, ...] is put together
    from; several stand one after the other in its second dimension. Empty for other parameters."""
    for target, sources in _of_experts(model):
        if name.endswith(target):
            return [name.removesuffix(target) + source for source in sources]
    return []


def aliases_of(model: PreTrainedModel, name: str) -> Iterator[str]:
    """What checkpoints of this model, and so old adapters, call the module or parameter `name`."""
    for conversion in _conversions(model):
        if not isinstance(conversion, WeightRenaming):
            continue
        pairs = zip(conversion.source_patterns, conversion.target_patterns, strict=False)
        for source, target in pairs:
            old, new = (_plain(pattern) for pattern in (source, target))
            padded = f".{name}."
            if old and new and f".{new}." in padded:
                yield padded.replace(f".{new}.", f".{old}.").strip(".")


def old_names(model: PreTrainedModel, names: Collection[str]) -> dict[str, str]:
    """What checkpoints of a multimodal model, and so old adapters, call its modules `names` -> the name.

    Every renaming that transformers does to such checkpoints, of whichever part of the model, is undone
    or left alone; what transformers would make the name of again is an old name. One that would serve
    for two modules is none."""
    forward = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    backward = [conversion.reverse_transform() for conversion in reversed(forward)]
    prefix = model.base_model_prefix
    there = {f"{name}.weight": name for name in names}
    found: dict[str, set[str]] = {}
    for key, name in there.items():
        candidates = {key, key.removeprefix(f"{prefix}.")}
        for renaming in backward:
            candidates |= {renaming.rename_source_key(old)[0] for old in candidates}
        candidates |= {f"{prefix}.{old}" for old in candidates if not old.startswith(f"{prefix}.")}
        for old in sorted(candidates - there.keys()):
            new, _ = rename_source_key(old, forward, [], prefix, there)
            if new == key:
                found.setdefault(old.removesuffix(".weight"), set()).add(name)
    return {old: whose.pop() for old, whose in found.items() if len(whose) == 1}


def _plain(pattern: str) -> str:
    """A pattern that is nothing but a part of a name, without dots around it; else nothing."""
    text = pattern.replace("\\.", ".").strip("^$.")
    return text if text.replace(".", "").replace("_", "").isalnum() else ""
