"""`trainable_token_indices` of an adapter_config.json: a list, or lists by the names of modules.

Torch-free.
"""

from __future__ import annotations

from typing import Any

LARGEST_TOKEN = 1 << 31


def bad_token_indices(value: Any) -> list[str]:
    """Reasons against what stands there."""
    if not value:
        return []
    lists = list(value.values()) if isinstance(value, dict) else [value]
    if not all(isinstance(ids, list) and all(_is_token(i) for i in ids) for ids in lists):
        return ["trainable_token_indices must be a list of token ids, or map modules to such lists"]
    if any(len(set(ids)) < len(ids) for ids in lists):
        return ["trainable_token_indices names a token twice"]
    return []


def token_indices(value: Any) -> dict[str, tuple[int, ...]]:
    """Module -> ids, of a value that nothing speaks against; "" is the input embedding."""
    if not value:
        return {}
    found = value if isinstance(value, dict) else {"": value}
    return {name: tuple(ids) for name, ids in found.items()}


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_TOKEN
