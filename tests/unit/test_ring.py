"""Bytes through the ring: in order, and no chunk is filled again before it has been read."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from loramux.adapters import files
from loramux.engine import ring
from loramux.engine.ring import Ring


class Late:
    """A device that does nothing until somebody waits for it."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []

    def event(self) -> LateEvent:
        return LateEvent(self)

    def run(self, count: int) -> None:
        for work in self.queue[:count]:
            work()
        self.queue[:count] = [lambda: None] * len(self.queue[:count])


class LateEvent:
    def __init__(self, device: Late):
        self.device = device
        self.behind = 0

    def record(self, stream: object) -> None:
        self.behind = len(self.device.queue)

    def synchronize(self) -> None:
        self.device.run(self.behind)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 64 * 3, 64 * 20 + 7])
def test_every_byte_arrives(monkeypatch: pytest.MonkeyPatch, size: int, threads: int) -> None:
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    monkeypatch.setattr(ring, "copiers", lambda: pool)
    monkeypatch.setattr(files, "PIECE", 8)
    monkeypatch.setattr(files, "PAGE", 4)
    device = Late()
    through = Ring([device.event() for _ in range(3)], chunk_bytes=64, pinned=False)
    for _ in range(2):  # the second begins in the middle of the ring
        host = torch.randint(0, 256, (size,), dtype=torch.uint8)  # [bytes]
        arrived = torch.zeros_like(host)  # [bytes]

        def pass_on(start: int, chunk: torch.Tensor, arrived: torch.Tensor = arrived) -> None:
            def read() -> None:
                arrived[start : start + len(chunk)] = chunk

            device.queue.append(read)

        through.send(host, pass_on, None)
        device.run(len(device.queue))
        assert torch.equal(arrived, host)


def test_a_copy_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def submit(self, *_: object) -> None:
            raise MemoryError("no thread")

    monkeypatch.setattr(ring, "copiers", Broken)
    with pytest.raises(MemoryError, match="no thread"):
        Ring([Late().event()], chunk_bytes=4, pinned=False).send(
            torch.zeros(8, dtype=torch.uint8), lambda start, chunk: None, None
        )
