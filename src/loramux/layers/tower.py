"""Linear layers of the encoders of images and sound: their rows are shared out among the items.

Which rows a layer is given, and in which layout, is the model's affair: crops, patches, windows, merged
ones. Items that are encoded together stand one behind the other, so each has its part of the rows,
however many there are, which is seen when they come. Items of one composition need not even that. A step
of text does not reach these layers: their `StepBatch` is the encoders' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import nn

from loramux.errors import EngineError
from loramux.kernels import AFFINE, Expand, Segments, WorkList
from loramux.layers.batch import LoRAStep, StepBatch, UniformLoRA
from loramux.layers.linear import LinearSlice, MergedLinear

CHUNK = 64  # rows

Share = tuple[UniformLoRA | None, int]
"""What an item takes, and how much of all rows is its own, in units of any size."""

Piece = tuple[UniformLoRA | None, int, int]
"""Rows [start, end) that take one composition."""


class TowerStep:
    """The compositions of the encoding that runs now, in the kernels' terms for any number of rows."""

    def __init__(self) -> None:
        self.batch = StepBatch()
        self._shares: list[Share] = []
        self._device = torch.device("cpu")
        self._segments: dict[int, Segments] = {}  # by the number of rows
        self._steps: dict[int, LoRAStep] = {}  # likewise

    @contextmanager
    def of(self, shares: Sequence[Share], device: torch.device) -> Iterator[None]:
        """While it lasts, rows are shared out so, in this order."""
        self._shares, self._device = joined(shares), device
        try:
            yield
        finally:
            self._shares = []
            self._segments.clear()
            self._steps.clear()
            self.batch.clear()

    def take(self, rows: int) -> None:
        """Make the batch one of `rows` rows. Raises EngineError if they do not come out even."""
        self.batch.clear()
        if not rows or all(lora is None for lora, _ in self._shares):
            return
        if self._device.type == "cpu":
            if rows not in self._segments:
                self._segments[rows] = segments(pieces(self._shares, rows))
            self.batch.segments = self._segments[rows]
        else:
            if rows not in self._steps:
                self._steps[rows] = lora_step(pieces(self._shares, rows), self._device)
            self.batch.lora = self._steps[rows]


class TowerLinear(MergedLinear):
    """One linear layer of an encoder."""

    takes_rows = False  # which would make every product larger, with adapters or without

    def __init__(self, linear: nn.Linear, step: TowerStep):
        super().__init__([linear], step.batch)
        self._step = step

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, Expand | None]:
        """x [T, K] -> y [T, N], and the LoRA delta that is still to be added."""
        self._step.take(x.shape[0])
        return super().project(x)


class TowerSlice(LinearSlice):
    """Stands where an nn.Linear of an encoder stood."""

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias [N]: some encoders ask it for device and type."""
        return self.merged.bias


def joined(shares: Sequence[Share]) -> list[Share]:
    """Neighbours of one composition as one; a composition without members is none."""
    known = [(lora if lora and lora.members else None, size) for lora, size in shares]
    return [
        (lora, sum(size for _, size in some))
        for lora, some in groupby(known, key=lambda share: share[0])
    ]


def pieces(shares: Sequence[Share], rows: int) -> list[Piece]:
    """`rows` rows shared out. Raises EngineError if they do not come out even."""
    whole, before, found = sum(size for _, size in shares), 0, []
    for lora, size in shares:
        cuts = rows * before, rows * (before + size)
        if cuts[0] % whole or cuts[1] % whole:
            raise EngineError(
                f"{rows} rows of an encoder are not those of its items. This is a bug."
            )
        found.append((lora, cuts[0] // whole, cuts[1] // whole))
        before += size
    return found


def segments(found: Sequence[Piece]) -> Segments:
    """Pieces as a CPU takes them."""
    adapted = [(lora, start, end) for lora, start, end in found if lora is not None]
    members = [member for lora, _, _ in adapted for member in lora.members]
    offsets = [0]
    for lora, _, _ in adapted:
        offsets.append(offsets[-1] + len(lora.members))
    return Segments(
        starts=_ints([start for _, start, _ in adapted]),  # [G]
        ends=_ints([end for _, _, end in adapted]),  # [G]
        member_offsets=_ints(offsets),  # [G + 1]
        member_rows=_ints([row for row, _ in members]),  # [M]
        member_scales=torch.tensor([scale for _, scale in members]),  # [M]
        num_segments=len(adapted),
        affine_rows=frozenset(row for lora, _, _ in adapted for row in lora.affine_rows),
    )


def lora_step(found: Sequence[Piece], device: torch.device) -> LoRAStep:
    """Pieces in chunks, as a GPU takes them."""
    places: list[int] = []
    columns: list[int] = []
    scales: list[float] = []
    ranks: list[int] = []
    plain: list[tuple[int, ...]] = []
    adapted: list[tuple[int, ...]] = []
    for lora, start, end in found:
        cuts = [(low, min(low + CHUNK, end)) for low in range(start, end, CHUNK)]
        if lora is None:
            plain += [(*cut, 0, 0, 0, 0, 0, 0) for cut in cuts]
            continue
        first = len(places)
        for index, (row, scale) in enumerate(lora.members):
            places.append(row)
            columns.append(sum(lora.ranks[:index]))
            scales.append(scale)
            ranks.append(lora.ranks[index] + (AFFINE if row in lora.affine_rows else 0))
        bits = int(torch.tensor(scales[first], dtype=torch.float32).view(torch.int32))
        leading = (places[first], columns[first], bits, ranks[first])
        adapted += [(*cut, first, len(places), *leading) for cut in cuts]
    work = WorkList(
        chunks=_ints(plain + adapted).to(device),  # [C, 8]
        counts=_ints([len(plain), len(plain) + len(adapted)]).to(device),  # [2]
        member_rows=_ints(places).to(device),  # [M]
        member_columns=_ints(columns).to(device),  # [M]
        member_scales=torch.tensor(scales, dtype=torch.float32).to(device),  # [M]
        member_ranks=_ints(ranks).to(device),  # [M]
        rows_per_chunk=CHUNK,
        max_chunks=len(plain) + len(adapted),
        affine=any(r >= AFFINE for r in ranks),
    )
    widest = max(sum(lora.ranks) for lora, _, _ in found if lora is not None)
    return LoRAStep(work, base_rows=0, width=widest)


def _ints(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
