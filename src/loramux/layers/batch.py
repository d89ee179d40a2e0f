"""What the layers read in one step. Built once; the runner puts each step's values into it.

Wrapped layers keep a reference to the one `StepBatch` of their model, because a transformers module
passes its inputs on and nothing else. It holds tensors and pool rows, never adapter names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loramux.kernels import AttentionBatch, Segments


@dataclass(slots=True)
class StepBatch:
    """The step that runs now; all fields are None between steps.

    `slots` [T] int64 says where each token's K and V go (block * block_size + offset), `attention`
    which rows see which blocks, `segments` which tokens take which adapters (None: no adapter).
    """

    slots: torch.Tensor | None = None
    attention: AttentionBatch | None = None
    segments: Segments | None = None

    def clear(self) -> None:
        self.slots = self.attention = self.segments = None
