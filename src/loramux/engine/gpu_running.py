"""A step on a GPU between its launch and the reading of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from loramux.engine.hidden import Pooled
from loramux.engine.plan import Row, StepResult
from loramux.engine.sampler import Choice


@dataclass(slots=True)
class GpuRunning:
    """A launched step whose tokens are on their way to the host."""

    rows: list[Row]
    choice: Choice | None  # of rank 0
    pooled: Pooled = field(default_factory=Pooled)
    not_encoded: Mapping[str, Exception] = field(default_factory=dict)

    def read(self) -> StepResult:
        """Wait for this step, and for no other. On rank 0."""
        assert self.choice is not None
        sampled = self.choice.read()
        ids = (row.sequence_id for row in self.rows)
        answers = dict(zip(ids, sampled, strict=True))
        return StepResult(answers, self.pooled.read(), self.not_encoded)


def event_behind_all() -> torch.cuda.Event:
    """An event that fires when all that was queued on the current stream is done."""
    event = torch.cuda.Event()
    event.record()
    return event
