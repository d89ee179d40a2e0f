"""Write docs/configuration.md from the settings' own fields: python docs/generate.py [--check]

The text of each field is its docstring in src/loramux/config; nothing here repeats it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from loramux.cli import NOT_FLAGS, flag_of
from loramux.config import EngineConfig, LoRAConfig, MediaConfig, ReplicaConfig, ServerConfig
from loramux.config.lora import DUAL_STREAM_VARIABLE
from loramux.config.other_names import OTHER_NAMES

PAGE = Path(__file__).with_name("configuration.md")
SECTIONS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("Engine", "`LLM(...)` and `loramux serve`.", EngineConfig),
    ("LoRA", "The same two, with `enable_lora=True` or `--enable-lora`.", LoRAConfig),
    (
        "Media",
        "`LLM(...)` and `loramux serve`, of a model that takes images or sound.",
        MediaConfig,
    ),
    ("Server", "`loramux serve` only.", ServerConfig),
    ("Replicas", "`loramux serve` only; [replicas](replicas.md) on Ray.", ReplicaConfig),
)
HEAD = """# Configuration

<!-- Written by docs/generate.py from src/loramux/config. Change the docstrings there, then `make docs`. -->

Every setting is a keyword argument of `LLM` and a flag of `loramux serve`. An unknown name is an
error, and so is a setting whose machinery is not there yet: nothing is accepted and ignored.
"""
TAIL = f"""
## Environment

| variable | meaning |
|---|---|
| `LORAMUX_CACHE` | Where downloaded adapters, kernels and the demo model are kept, instead of `~/.cache/loramux`. |
| `LORAMUX_CPU_KERNELS` | `reference` runs the plain torch twins of the CPU kernels. |
| `LORAMUX_DEBUG` | `1` shows the traceback of an error that the command line would print in one line. |
| `{DUAL_STREAM_VARIABLE}` | `1` runs the shrink of linear layers on a second CUDA stream, beside the base product. Refused off CUDA; no effect with `fully_sharded_loras`, on experts and on routers. |
"""


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, where, settings in SECTIONS:
        parts.append(f"\n## {title}\n\n{where}\n\n| setting | type | default | meaning |\n")
        parts.append("|---|---|---|---|\n")
        parts += [
            row(name, field)
            for name, field in settings.model_fields.items()
            if name not in NOT_FLAGS or name == "model"
        ]
    return "".join(parts) + TAIL


def row(name: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split())
    names = [name, *(other for other, field in OTHER_NAMES.items() if field == name)]
    flags = [] if name == "model" else map(flag_of, names)
    shown = "<br>".join(f"`{text}`" for text in (*names, *flags))
    cells = (shown, f"`{type_name(field.annotation)}`", default_of(field), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def default_of(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    return "none" if default is None else f"`{default}`"


def type_name(kind: Any) -> str:
    """`int`, `list[str]`, `"auto" | "float32"`: without None, which the default shows."""
    arguments = [part for part in get_args(kind) if part is not type(None)]
    origin = get_origin(kind)
    if not arguments:
        return str(kind.__name__)
    if isinstance(arguments[0], str):
        return " | ".join(f'"{word}"' for word in arguments)
    names = [type_name(part) for part in arguments]
    return f"{origin.__name__}[{', '.join(names)}]" if origin in (list, dict) else " | ".join(names)


def main(argv: list[str]) -> int:
    page = render()
    if "--check" in argv:
        return 0 if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page else 1
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
