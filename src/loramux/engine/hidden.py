"""The hidden states that pooled sequences of a step want, out of the forward and to the host.

A step that has such sequences is launched, not replayed: captured graphs leave logits only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
import torch

from loramux.engine.plan import Row
from loramux.engine.transfer import Download, upload
from loramux.models.attach import Attached
from loramux.models.hidden import kept_hidden


class Pooled:
    """Of one step. `read` when the step has been waited for."""

    def __init__(self, sequences: Sequence[int] = ()):
        self._sequences = sequences
        self._download: Download | None = None

    def send(self, hidden: torch.Tensor) -> None:
        """Start the way of `hidden` [N, D], a row a sequence, to the host."""
        self._download = Download(hidden)

    def read(self) -> dict[int, torch.Tensor]:
        """sequence id -> hidden state [D] float32."""
        if self._download is None:
            return {}
        (hidden,) = self._download.wait()  # [N, D]
        return dict(zip(self._sequences, hidden, strict=True))


@contextmanager
def pooling(attached: Attached, rows: Sequence[Row], pooled: Sequence[int]) -> Iterator[Pooled]:
    """Around the forward of `rows`, whose last tokens' states the sequences `pooled` want."""
    if not pooled:
        yield Pooled()
        return
    wanted = set(pooled)
    ends = accumulate(len(row.token_ids) for row in rows)
    places = [
        (row.sequence_id, end - 1)
        for row, end in zip(rows, ends, strict=True)
        if row.sequence_id in wanted
    ]
    (index,) = upload(attached.device, np.array([place for _, place in places]))  # [N] int64
    step = Pooled([sequence for sequence, _ in places])
    with kept_hidden(attached, index) as found:
        yield step
    step.send(found.states)
