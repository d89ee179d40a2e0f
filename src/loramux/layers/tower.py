"""Linear layers of the encoders of images and sound: one composition for all of their rows.

An encoder is run for media that take the same adapters, so it does not matter which rows a layer is
given, and in which layout: crops, patches, windows. Only how many there are, which is seen when they
come. A step of text does not reach these layers: their `StepBatch` is the encoders' own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from loramux.kernels import Expand, Segments, WorkList
from loramux.layers.batch import LoRAStep, StepBatch, UniformLoRA
from loramux.layers.linear import LinearSlice, MergedLinear

CHUNK = 64  # rows


class TowerStep:
    """The composition of the encoding that runs now, in the kernels' terms for any number of rows."""

    def __init__(self) -> None:
        self.batch = StepBatch()
        self._lora: UniformLoRA | None = None
        self._device = torch.device("cpu")
        self._segments: dict[int, Segments] = {}  # by the number of rows
        self._steps: dict[int, LoRAStep] = {}  # likewise

    @contextmanager
    def of(self, lora: UniformLoRA | None, device: torch.device) -> Iterator[None]:
        """While it lasts, every row takes `lora`."""
        self._lora, self._device = lora, device
        try:
            yield
        finally:
            self._lora = None
            self._segments.clear()
            self._steps.clear()
            self.batch.clear()

    def take(self, rows: int) -> None:
        """Make the batch one of `rows` rows."""
        self.batch.clear()
        if self._lora is None or not self._lora.members or not rows:
            return
        if self._device.type == "cpu":
            if rows not in self._segments:
                self._segments[rows] = uniform_segments(self._lora, rows)
            self.batch.segments = self._segments[rows]
        else:
            if rows not in self._steps:
                self._steps[rows] = uniform_step(self._lora, rows, self._device)
            self.batch.lora = self._steps[rows]


class TowerLinear(MergedLinear):
    """One linear layer of an encoder."""

    def __init__(self, linear: nn.Linear, step: TowerStep):
        super().__init__([linear], step.batch)
        self._step = step

    def attach_site(self, rows: int, dtype: torch.dtype, *, under_weight: bool = False) -> None:
        """As for other layers, but A never stands under the weight: that would make every product
        larger, with adapters or without."""
        super().attach_site(rows, dtype)

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


def uniform_segments(lora: UniformLoRA, rows: int) -> Segments:
    """All of `rows` rows as one segment, on a CPU."""
    places, scales = zip(*lora.members, strict=True)
    return Segments(
        starts=_ints([0]),  # [1]
        ends=_ints([rows]),  # [1]
        member_offsets=_ints([0, len(places)]),  # [2]
        member_rows=_ints(places),  # [M]
        member_scales=torch.tensor(scales, dtype=torch.float32),  # [M]
        num_segments=1,
    )


def uniform_step(lora: UniformLoRA, rows: int, device: torch.device) -> LoRAStep:
    """All of `rows` rows in chunks with the same members."""
    places, scales = zip(*lora.members, strict=True)
    columns = [sum(lora.ranks[:i]) for i in range(len(places))]
    factors = torch.tensor(scales, dtype=torch.float32)  # [M]
    first = (places[0], columns[0], int(factors.view(torch.int32)[0]), lora.ranks[0])
    chunks = [
        (start, min(start + CHUNK, rows), 0, len(places), *first) for start in range(0, rows, CHUNK)
    ]
    work = WorkList(
        chunks=_ints(chunks).to(device),  # [C, 8]
        counts=_ints([0, len(chunks)]).to(device),  # [2]
        member_rows=_ints(places).to(device),  # [M]
        member_columns=_ints(columns).to(device),  # [M]
        member_scales=factors.to(device),  # [M]
        member_ranks=_ints(lora.ranks).to(device),  # [M]
        rows_per_chunk=CHUNK,
        max_chunks=len(chunks),
    )
    return LoRAStep(work, base_rows=0, width=sum(lora.ranks))


def _ints(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
