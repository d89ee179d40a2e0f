"""Which adapter names are allowed, and which folders a client may have loaded.

Names: up to 128 characters of ASCII letters, digits and `._:@-`, in one or more parts divided by
single slashes (as in Hub ids); each part begins with a letter, a digit or an underscore. So no
name looks like a path that leaves its folder, holds a control character, or contains the "+" that
joins names in metrics.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from loramux.errors import AdapterNotFound, Forbidden, InvalidField
from loramux.types import MAX_NAME_LENGTH, is_adapter_name

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check_name(name: str) -> str:
    """The name, or InvalidField saying which names are allowed."""
    if not is_adapter_name(name):
        shown = name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH]}..."
        raise InvalidField(
            f"lora_name {shown!r} is not allowed",
            field="lora_name",
            remedy=f"use at most {MAX_NAME_LENGTH} letters, digits and ._:@- in parts divided by "
            "/, each beginning with a letter, a digit or _",
        )
    return name


def resolve_path(lora_path: str, lora_root: str) -> str:
    """The real folder that `lora_path` means, proven to lie inside `lora_root` with all its files.

    A relative path starts at the root. Blocks on the file system. Raises InvalidField for what is
    no path, Forbidden for what leads outside, AdapterNotFound for what is not there.
    """
    if not lora_path or _CONTROL.search(lora_path):
        raise InvalidField(
            "lora_path is empty or holds control characters",
            field="lora_path",
            remedy="name a folder under the server's lora_root",
        )
    if lora_path.startswith("~") or ".." in Path(lora_path).parts:
        raise _outside(lora_path)
    root = os.path.realpath(lora_root)
    real = os.path.realpath(os.path.join(root, lora_path))
    # Before anything is looked up, so that the answer tells nothing about the world outside.
    _check_inside(real, root, lora_path)
    if not os.path.isdir(real):
        raise AdapterNotFound(
            f"there is no adapter folder {lora_path!r} under lora_root", field="lora_path"
        )
    for entry in os.scandir(real):
        _check_inside(os.path.realpath(entry.path), root, f"{lora_path}/{entry.name}")
    return real


def _check_inside(real: str, root: str, shown: str) -> None:
    if os.path.commonpath([real, root]) != root:
        raise _outside(shown)


def _outside(shown: str) -> Forbidden:
    return Forbidden(
        f"lora_path {shown!r} is not inside the server's lora_root",
        field="lora_path",
        remedy="put the adapter under the folder given as --lora-root; links may not leave it",
    )
