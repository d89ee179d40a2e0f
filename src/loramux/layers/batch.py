"""What the layers read in one step. Built once; the runner puts each step's values into it.

Wrapped layers keep a reference to the one `StepBatch` of their model, because a transformers module
passes its inputs on and nothing else. It holds tensors and pool rows, never adapter names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loramux.kernels import AttentionBatch, Segments, WorkList


@dataclass(frozen=True, slots=True, eq=False)
class LoRAStep:
    """How a GPU step adds its adapters' deltas; the same for every layer."""

    work: WorkList

    base_rows: int
    """Pool rows whose A stands in this step's base product, which then shrinks for free; 0: a kernel
    of its own shrinks the rows of the adapters that are there, and only those."""

    width: int = 0
    """Columns of shrunk activations a slice needs, if a kernel of its own makes them."""

    stream: torch.cuda.Stream | None = None
    """Where that kernel runs beside the base product; None: before it."""

    dealt: WorkList | None = None
    """`work` in the rows of A of one rank, where `fully_sharded_loras` deals them out."""

    deltas: WorkList | None = None
    """There, `work` without gains and shifts: a rank adds its part of the delta before a sum."""

    affine: WorkList | None = None
    """There, `work` with nothing but gains and shifts, for behind that sum."""

    @property
    def columns(self) -> int:
        """As `width`, for a layer whose A never stands in its base product: members stand where the
        step's others have them."""
        return max(self.base_rows, self.width)


@dataclass(frozen=True, slots=True, eq=False)
class Overlay:
    """Vectors that take the place of the embeddings of some rows of a step."""

    rows: torch.Tensor
    """[M] int64: which rows, each once."""

    vectors: torch.Tensor
    """[1 + L, M, D]: first what replaces the embeddings; then, for each of L layers from the first on,
    what is added to those rows behind that layer (Qwen3-VL's deepstack features)."""


@dataclass(frozen=True, slots=True)
class UniformLoRA:
    """One composition for every row of an item, in whatever a layer is given: how encoders are adapted.

    `members` are (first pool row, scale) as a step's rows have them, `ranks` the rank rows that the
    adapter of each of these pool rows takes.
    """

    members: tuple[tuple[int, float], ...]
    ranks: tuple[int, ...]

    affine_rows: frozenset[int] = frozenset()
    """Those of its pool rows whose adapters have gains and shifts."""


@dataclass(frozen=True, slots=True)
class VocabularyRun:
    """Neighbouring tokens of a composition that changes the vocabulary: which `tokens` of the step they
    are, which rows of its logits, how many tokens their vocabulary has, and their `members` as a step's
    rows have them."""

    tokens: slice
    kept: slice
    size: int
    members: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class VocabularyStep:
    """The runs of a step that change the vocabulary, and how many columns its logits have."""

    runs: tuple[VocabularyRun, ...]
    size: int


@dataclass(slots=True)
class StepBatch:
    """The step that runs now; all fields are None between steps.

    `slots` [T] (int64 on a CPU, int32 on a GPU) says where each token's K and V go (block *
    block_size + offset; -1: nowhere), `positions` [T] int32 where it stands in its sequence,
    `attention` which rows see which blocks. Which tokens take which adapters is in `segments` on a
    CPU and in `lora` on a GPU (None: no adapter), and what adapters change of embeddings and logits
    in `vocabulary`.
    """

    slots: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    attention: AttentionBatch | None = None
    segments: Segments | None = None
    lora: LoRAStep | None = None
    vocabulary: VocabularyStep | None = None

    def clear(self) -> None:
        self.slots = self.positions = self.attention = self.segments = self.lora = None
        self.vocabulary = None
