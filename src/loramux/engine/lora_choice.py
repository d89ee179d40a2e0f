"""Where a step's LoRA shrink happens: in the base product, or in a kernel of its own.

The A rows of the adapter pool stand under the base weights. A step may let the base product run on
over the first rows of the pool: that costs those rows, whether or not their adapters are in the
step, and no launch. Or a kernel shrinks for the adapters that are there, and only for those: one
launch a product. Which is cheaper depends on the step and on the device, so it is measured once
(`engine/tuning.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from loramux.engine.packing import Run
from loramux.engine.plan import Members


class Costs(Protocol):
    """Microseconds that a step of `tokens` tokens takes longer, over all layers."""

    def in_product(self, tokens: int, rows: int) -> float:
        """With the first `rows` pool rows in every base product."""
        ...

    def in_kernel(self, tokens: int, rows: int) -> float:
        """With a shrink kernel for compositions of `rows` rank rows in all."""
        ...


@dataclass(frozen=True, slots=True)
class LoRAChoice:
    """How one step shrinks. `columns` says where each member's activations stand in `Expand.h`."""

    base_rows: int
    width: int
    columns: Mapping[Members, Sequence[int]]


class LoRAChooser:
    """Decides for each step. `buckets` are the pool rows that a base product may take along,
    ascending; empty where A cannot stand under the weights."""

    def __init__(self, buckets: Sequence[int], costs: Costs):
        self.buckets = tuple(buckets)
        self._costs = costs

    def choose(
        self,
        runs: Sequence[Run],
        ranks: Mapping[int, int],
        tokens: int,
        buckets: Sequence[int] | None = None,
    ) -> LoRAChoice:
        """`ranks` maps an adapter's first pool row to its rank rows; `buckets`: these of all alone."""
        needed = active = width = 0
        pooled: dict[Members, list[int]] = {}
        for run in runs:
            if run.members and run.members not in pooled:
                column, columns = 0, []
                for row, _ in run.members:
                    columns.append(column)
                    column += ranks[row]
                    needed = max(needed, row + ranks[row])
                pooled[run.members] = columns
                active += column
                width = max(width, column)
        bucket = next(
            (b for b in (self.buckets if buckets is None else buckets) if b >= needed), None
        )
        if bucket is not None and (
            self._costs.in_product(tokens, bucket) <= self._costs.in_kernel(tokens, active)
        ):
            inside = {members: [row for row, _ in members] for members in pooled}
            return LoRAChoice(bucket, width, inside)
        return LoRAChoice(0, width, pooled)
