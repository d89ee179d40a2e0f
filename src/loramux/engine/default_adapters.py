"""Which adapters a request gets that carries media and names none. Torch-free.

    modalities of the request ──┐
    default_mm_loras ───────────┼─▶ none, one, or several: the policy decides ─▶ AdapterUses
    adapters named explicitly ──┘   (these win, the empty list too)

They are served under names that no caller can have or ask for: `~image`, `~audio`, `~video`. One folder
for several modalities is one adapter, which applies once.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from loramux.config import LoRAConfig
from loramux.errors import InvalidField
from loramux.types import AdapterUse

MARK = "~"  # in no name that a caller may give, see `server/adapter_paths.py`


def default_name(modality: str) -> str:
    return MARK + modality


def is_default(name: str) -> bool:
    """Whether an adapter of this name is a default of some modality, and so not for callers to name."""
    return name.startswith(MARK)


def default_sources(lora: LoRAConfig | None) -> list[tuple[str, str]]:
    """(name, path) of every default adapter, in the alphabetical order of modalities."""
    if lora is None or not lora.default_mm_loras:
        return []
    return [(default_name(name), path) for name, path in sorted(lora.default_mm_loras.items())]


def default_int_ids(lora: LoRAConfig | None) -> dict[str, int]:
    """Name -> vLLM's `lora_int_id`: 1 to n in the alphabetical order of modalities."""
    return {name: position for position, (name, _) in enumerate(default_sources(lora), start=1)}


def choose_adapters(
    lora: LoRAConfig | None,
    modalities: Collection[str],
    explicit: Sequence[AdapterUse] | None = None,
) -> tuple[AdapterUse, ...]:
    """The adapters of a request that carries `modalities`; `explicit` is None where it names none.

    Raises InvalidField where several defaults apply and the policy is to refuse.
    """
    if explicit is not None:
        return tuple(explicit)
    if lora is None or not modalities:
        return ()
    chosen: dict[str, str] = {}  # folder -> name
    for name, path in default_sources(lora):
        if name.removeprefix(MARK) in modalities:
            chosen.setdefault(os.path.abspath(path), name)
    if len(chosen) > 1 and lora.default_mm_loras_policy == "none":
        return ()
    if len(chosen) > 1 and lora.default_mm_loras_policy == "refuse":
        carried = " and ".join(name.removeprefix(MARK) for name in chosen.values())
        raise InvalidField(
            f"the request carries {carried}, each with a default adapter of its own, and names none",
            field="lora",
            remedy="name the adapters in lora, or give the empty list for the base model",
        )
    return tuple(AdapterUse(name) for name in chosen.values())
