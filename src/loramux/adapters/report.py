"""The binding report: which tensor goes where. Printed by `loramux adapter check`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BindingRow:
    """One tensor of the file, the module it binds to, and the rank and scale it is used with."""

    tensor: str
    module: str
    shape: tuple[int, ...]
    dtype: str
    r: int
    scale: float


@dataclass(frozen=True, slots=True)
class BindingReport:
    """Every tensor of an adapter that binds; what does not bind is a refusal, never a row."""

    name: str
    digest: str
    rows: tuple[BindingRow, ...]
    num_modules: int
    unadapted: tuple[str, ...] = ()

    @property
    def max_r(self) -> int:
        return max((row.r for row in self.rows), default=0)

    def format(self) -> str:
        """A table for people: one line a tensor, then the totals."""
        lines = [f"{'module':<48} {'tensor':<8} {'shape':<16} {'r':>4} {'scale':>9}  dtype"]
        for row in self.rows:
            kind = "lora_A" if ".lora_A." in row.tensor else "lora_B"
            shape = "x".join(map(str, row.shape))
            lines.append(
                f"{row.module:<48} {kind:<8} {shape:<16} {row.r:>4} {row.scale:>9.4g}  {row.dtype}"
            )
        lines.append(
            f"{len(self.rows)} tensors bind to {self.num_modules} modules, largest r "
            f"{self.max_r}, digest {self.digest[:12]}; {len(self.unadapted)} linear modules are "
            "left as in the base model"
        )
        return "\n".join(lines)
