"""Which tensor goes where, and the report of it that `loramux adapter check` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from loramux.adapters.header import FileTensor

KINDS = (
    (".lora_A.weight", "lora_A"),
    (".lora_B.weight", "lora_B"),
    (".lora_B.bias", "B bias"),
    ("_A", "lora_A"),
    ("_B", "lora_B"),
    (".lora_magnitude_vector", "DoRA"),
    (".bias", "bias"),
    ("", "lora"),
)

SHOWN = 8  # reasons of one kind that are spelled out before they are counted


@dataclass(frozen=True, slots=True)
class BindingRow:
    """One tensor of the file, a module it binds to, and the rank and scale it is used with there.

    A tensor of all experts may bind to two modules: A of their fused gate and up does.
    """

    tensor: str
    module: str
    shape: tuple[int, ...]
    dtype: str
    r: int
    scale: float


@dataclass(frozen=True, slots=True)
class Binding:
    """A LoRA module of the file, its factors `a` and `b`, as `module` of the model."""

    module: str
    a: FileTensor
    b: FileTensor
    r: int
    scale: float

    @property
    def rows(self) -> list[BindingRow]:
        return [
            BindingRow(t.key, self.module, t.shape, t.dtype, self.r, self.scale)
            for t in (self.a, self.b)
        ]


@dataclass(frozen=True, slots=True)
class BindingReport:
    """Every tensor of an adapter that binds; what does not bind is a refusal, never a row."""

    name: str
    digest: str
    rows: tuple[BindingRow, ...]
    num_modules: int
    unadapted: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()  # of its classification head
    invocation: tuple[int, ...] = ()  # of an activated LoRA
    vocabulary: tuple[str, ...] = ()  # what it changes there beside LoRA
    own_tokenizer: bool = False  # or a chat template

    @property
    def max_r(self) -> int:
        return max((row.r for row in self.rows), default=0)

    def format(self) -> str:
        """A table for people: one line a tensor, or for all experts whose tensors are alike, and then
        the totals."""
        lines = [f"{'module':<48} {'tensor':<8} {'shape':<16} {'r':>4} {'scale':>9}  dtype"]
        alike: Counter[str] = Counter()
        for row in self.rows:
            kind = next(name for end, name in KINDS if row.tensor.endswith(end))
            shape = "x".join(map(str, row.shape))
            alike[
                f"{row.module:<48} {kind:<8} {shape:<16} {row.r:>4} {row.scale:>9.4g}  {row.dtype}"
            ] += 1
        lines += [
            line if count == 1 else f"{line}, {count} experts" for line, count in alike.items()
        ]
        lines.append(
            f"{len({row.tensor for row in self.rows})} tensors bind to {self.num_modules} modules, "
            f"largest r {self.max_r}, digest {self.digest[:12]}; {len(self.unadapted)} linear "
            "modules are left as in the base model"
        )
        if self.labels:
            lines.append(f"a classification head of {len(self.labels)}: {', '.join(self.labels)}")
        if self.invocation:
            tokens = ", ".join(map(str, self.invocation))
            lines.append(f"applies from the last occurrence of these tokens on: {tokens}")
        if self.vocabulary:
            lines.append(", ".join(self.vocabulary))
        if self.own_tokenizer:
            lines.append("a tokenizer or chat template of its own, which its requests get")
        return "\n".join(lines)


def summarise(reasons: Sequence[str]) -> list[str]:
    """The first few in full, then how many more."""
    if len(reasons) <= SHOWN:
        return list(reasons)
    return [*reasons[:SHOWN], f"and {len(reasons) - SHOWN} more of the same kind"]
