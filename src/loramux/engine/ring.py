"""Pinned memory that bytes pass through on their way to a GPU, a chunk at a time, round and round.

    threads   copy 0 │ copy 1 │ copy 2 │ copy 3 │ ...         pageable -> pinned
    stream           │ send 0 │ send 1 │ send 2 │ ...         pinned -> device

One core moves 6 to 15 GB/s, less than the copy engine takes, so several fill chunks at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

import numpy as np
import torch

from loramux.adapters.files import MOST_COPIERS, copiers, piece

CHUNK_BYTES = 12 << 20
CHUNKS = MOST_COPIERS  # together as large as most adapters, which then wait for no chunk to be read


class Event(Protocol):
    """What fires when a chunk has been read: a CUDA event."""

    def record(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...


class Ring:
    """As many chunks of up to `chunk_bytes` as there are events in `free`; one thread at a time."""

    def __init__(
        self, free: Sequence[Event], *, chunk_bytes: int = CHUNK_BYTES, pinned: bool = True
    ):
        self._free = list(free)
        size = (len(self._free), chunk_bytes)
        self._chunks = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._turn = 0

    def send(
        self, host: torch.Tensor, pass_on: Callable[[int, torch.Tensor], None], stream: Any
    ) -> None:
        """Call `pass_on(start, chunk)` for one piece of `host` [bytes] after the other, in order.

        `pass_on` queues on `stream` what reads the chunk; it may not have been read on return."""
        size = min(self._chunks.shape[1], piece(host.numel(), len(self._free)))
        filling: deque[tuple[int, int, torch.Tensor, Future[None] | None]] = deque()

        def next_on() -> None:
            start, turn, chunk, copied = filling.popleft()
            if copied is not None:
                copied.result()
            pass_on(start, chunk)
            self._free[turn].record(stream)

        try:
            for start in range(0, host.numel(), size):
                if len(filling) == len(self._free):
                    next_on()
                part = host[start : start + size]  # [chunk_bytes] or fewer
                turn, self._turn = self._turn, (self._turn + 1) % len(self._free)
                self._free[turn].synchronize()
                chunk = self._chunks[turn, : part.numel()]
                filling.append((start, turn, chunk, _copy(part, chunk)))
            while filling:
                next_on()
        finally:  # after an error: the chunks are used again
            wait([copied for *_, copied in filling if copied is not None])


def _copy(part: torch.Tensor, chunk: torch.Tensor) -> Future[None] | None:
    """Begin to copy; None: done."""
    # numpy, because it lets other threads run meanwhile and has none of its own.
    source, target = part.numpy(), chunk.numpy()
    threads = copiers()
    if threads is None:
        np.copyto(target, source)
        return None
    return threads.submit(np.copyto, target, source)
