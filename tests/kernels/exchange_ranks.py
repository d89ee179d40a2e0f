"""Ranks that exchange: processes that share memory and interpret the kernel, or streams of a GPU."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from loramux.kernels import triton_exchange
from loramux.parallel import exchange, join
from loramux.parallel.exchange import Exchange

SLOT_WORDS = 640
PROGRAMS, WORDS = 3, 32
PATIENCE_S = 120


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    shape: tuple[int, ...]  # [P, ...]
    run: int  # of a gather; 0: a sum
    wider: int = 0  # rows of a tensor that has so many more columns

    def own(self, rank: int, turn: int, device: str = "cpu") -> torch.Tensor:
        """What a rank has at its turn [P, ...]."""
        dice = torch.Generator().manual_seed(97 * turn + rank)
        *outer, width = self.shape
        numbers = 100 * torch.randn(*outer, width + self.wider, generator=dice)
        return numbers.to(self.dtype).to(device)[..., self.wider :]

    def expected(self, size: int, turn: int) -> torch.Tensor:
        """Sums are in float32, first over the parts, then in the order of the ranks."""
        ranks = [self._whole(self.own(rank, turn)) for rank in range(size)]
        if not self.run:
            return self._whole(torch.stack(ranks)).to(self.dtype)
        runs = torch.stack(ranks).view(size, -1, self.run)  # [N, M, run]
        return runs.transpose(0, 1).to(self.dtype)  # [M, N, run]

    def _whole(self, parts: torch.Tensor) -> torch.Tensor:
        """[P, ...] -> [...]."""
        total = parts[0] if parts.dtype == torch.int32 else parts[0].float()
        for part in parts[1:]:
            total = total + part
        return total

    def exchanged(self, by: Exchange, own: torch.Tensor) -> torch.Tensor:
        assert by.takes(own, sums=not self.run)
        if self.run:
            return by.gather(own, self.run)
        return by.sum(own, own.new_empty(own.shape[1:]) if self.wider else own[0])


CASES = [
    Case(torch.float32, (1, 1), 0),
    Case(torch.float32, (1, 640), 0),
    Case(torch.float32, (3, 5, 7), 0),
    Case(torch.bfloat16, (1, 9, 14), 0),
    Case(torch.float16, (1, 1280), 0),
    Case(torch.float32, (1, 4, 9), 3),
    Case(torch.float32, (4, 4, 9), 1),
    Case(torch.bfloat16, (1, 6, 10), 2),
    Case(torch.bfloat16, (1, 6, 9), 3),  # two runs meet in a word
    Case(torch.float16, (1, 2, 77), 1),
    Case(torch.int32, (1, 33), 33),
    Case(torch.bfloat16, (1, 1280), 1280),
    Case(torch.bfloat16, (1, 5, 6), 0, 10),
    Case(torch.float32, (1, 4, 9), 0, 1),
    Case(torch.bfloat16, (1, 7, 12), 3, 4),
    Case(torch.float16, (1, 40, 16), 16, 2),
]


def make_turns(count: int) -> list[Case]:
    dice = random.Random(5)
    return [*CASES, *(dice.choice(CASES) for _ in range(count))]


def mailboxes(rank: int, memory: torch.Tensor, epoch: int = 0) -> Any:
    """Those of `rank` in `memory` [N, 2, N, words], where all ranks' are."""
    device = memory.device
    return triton_exchange.Mailboxes(
        rank=rank,
        size=len(memory),
        addresses=torch.tensor([one.data_ptr() for one in memory], device=device),
        epochs=torch.full((PROGRAMS,), epoch, dtype=torch.int32, device=device),
        alive=torch.ones(1, dtype=torch.int32, device=device),
        slot_words=memory.shape[-1],
    )


def empty_memory(size: int, device: str = "cpu", words: int = SLOT_WORDS) -> torch.Tensor:
    return torch.zeros(size, 2, size, words, dtype=torch.int64, device=device)


def set_small(round_bytes: int) -> None:
    """Make messages take several rounds of several programs, and sums two rounds from there on."""
    triton_exchange.PROGRAMS, triton_exchange.WORDS = PROGRAMS, WORDS
    triton_exchange.ROUND_BYTES = round_bytes


def set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the test, to what it was before `set_small`."""
    for name in ("PROGRAMS", "WORDS", "ROUND_BYTES"):
        monkeypatch.setattr(triton_exchange, name, getattr(triton_exchange, name))


def set_up_ranks(trouble: str, store: Path) -> list[bool]:
    """Whether each of two ranks gets an exchange, when rank 1 is in `trouble`; on a CPU."""
    memory = empty_memory(2).share_memory_()
    return in_process_of_each(2, _set_up, memory, trouble, str(store))


def _set_up(rank: int, memory: torch.Tensor, trouble: str, store: str) -> bool:
    """As on GPUs, but for their memory."""
    set_small(round_bytes=0)
    exchange.TRIAL = 100
    trouble = trouble if rank == 1 else ""
    group = join(store, rank, 2, torch.device("cpu"), shared=False)

    class Garbled(Exchange):
        def sum(self, parts: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            return super().sum(parts, out).add_(1)

    def open_mailboxes(*_: Any) -> Exchange:
        if trouble == "closed":
            raise RuntimeError("no such memory")
        return (Garbled if trouble == "garbled" else Exchange)(mailboxes(rank, memory))

    exchange._out_of_reach = lambda *_: "far away" if trouble == "far" else None
    exchange._open = open_mailboxes
    return exchange.set_up(group, None, "", torch.device("cpu")) is not None


def _take_turns(
    rank: int, memory: torch.Tensor, turns: list[Case], epoch: int, round_bytes: int
) -> list[Any]:
    """Hurries and dawdles, and is late where the epoch passes zero."""
    set_small(round_bytes)
    own = Exchange(mailboxes(rank, memory, epoch))
    dice = random.Random(rank)
    found = []
    for turn, case in enumerate(turns):
        passes = rank > 0 and epoch + turn + 1 == 0
        time.sleep(0.5 if passes else dice.choice([0, 0, 0.01]))
        found.append(case.exchanged(own, case.own(rank, turn)).clone())
    return [one.view(torch.uint8).numpy() for one in found]


def in_processes(
    size: int, turns: list[Case], epoch: int, round_bytes: int
) -> list[list[torch.Tensor]]:
    """What comes out of each turn on each rank."""
    memory = empty_memory(size).share_memory_()
    answers = in_process_of_each(size, _take_turns, memory, turns, epoch, round_bytes)
    return [
        [
            torch.from_numpy(one.copy()).view(case.dtype)
            for case, one in zip(turns, of_rank, strict=True)
        ]
        for of_rank in answers
    ]


def in_process_of_each(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function` returns in a process for each rank."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_report, args=(results, function, rank, *args), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    answers = dict(_get(results, processes) for _ in processes)
    for process in processes:
        process.join(PATIENCE_S)
    return [answers[rank] for rank in range(size)]


def _report(results: Any, function: Callable[..., Any], rank: int, *args: Any) -> None:
    results.put((rank, function(rank, *args)))


def _get(results: Any, processes: list[Any]) -> Any:
    while all(process.exitcode in (None, 0) for process in processes):
        with contextlib.suppress(queue.Empty):
            return results.get(timeout=1)
    raise RuntimeError("a rank has died")


def on_streams(size: int, turns: list[Case], epoch: int) -> list[list[torch.Tensor]]:
    def start(turn: int, rank: int) -> Callable[[Exchange], torch.Tensor]:
        own = turns[turn].own(rank, turn, "cuda")
        return lambda by: turns[turn].exchanged(by, own)

    return on_stream_of_each(empty_memory(size, "cuda"), len(turns), start, epoch)


def on_stream_of_each(
    memory: torch.Tensor,
    turns: int,
    start: Callable[[int, int], Callable[[Exchange], torch.Tensor]],
    epoch: int = 0,
) -> list[list[torch.Tensor]]:
    """What each rank finds at its turns; `start` makes what finds it of a turn and a rank."""
    ranks = range(len(memory))
    boxes = [mailboxes(rank, memory, epoch) for rank in ranks]
    exchanges = [Exchange(box) for box in boxes]
    streams = [torch.cuda.Stream() for _ in ranks]

    def exchange_all() -> list[list[torch.Tensor]]:
        calls = [[start(turn, rank) for turn in range(turns)] for rank in ranks]
        torch.cuda.synchronize()
        found: list[list[torch.Tensor]] = [[] for _ in ranks]
        for turn in range(turns):
            for rank in ranks:
                with torch.cuda.stream(streams[rank]):
                    found[rank].append(calls[rank][turn](exchanges[rank]))
        torch.cuda.synchronize()
        return found

    # Without waiting for each other first: no kernel can be loaded while another of this GPU waits.
    for box in boxes:
        box.alive.zero_()
    exchange_all()
    for box in boxes:
        box.alive.fill_(1)
        box.epochs.fill_(epoch)
    memory.zero_()
    return [[one.cpu() for one in of_rank] for of_rank in exchange_all()]
