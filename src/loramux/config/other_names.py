"""Settings that go by two names: the field's own, and vLLM's where ours says more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Second names of fields -> the fields.
OTHER_NAMES = {
    "kv_cache_memory": "kv_cache_memory_bytes",
    "limit_mm_per_prompt": "max_items_per_request",
    "allowed_local_media_path": "allowed_media_roots",
}


def other_names(fields: Iterable[str]) -> dict[str, str]:
    """The second names of these fields -> the fields."""
    known = set(fields)
    return {other: name for other, name in OTHER_NAMES.items() if name in known}


def by_field_names(data: Any, fields: Iterable[str]) -> Any:
    """`data` with each value under its field's own name. Raises ValueError for one that is given under
    both names with two values."""
    if not isinstance(data, dict):
        return data
    data = dict(data)
    for other, name in other_names(fields).items():
        if other in data:
            value = data.pop(other)
            if data.get(name, value) != value:
                raise ValueError(f"{other} and {name} are one setting; give one of them")
            data[name] = value
    return data
