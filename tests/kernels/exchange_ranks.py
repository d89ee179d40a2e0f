"""Ranks that exchange: processes with memory in common that interpret the kernel, or streams of a GPU.

Random values are such that sums of them are exact in every type.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import random
import time
from dataclasses import dataclass
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from loramux.kernels import triton_exchange
from loramux.parallel.exchange import Exchange

SLOT_WORDS = 640
PROGRAMS, WORDS = 3, 32
PATIENCE_S = 120


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    shape: tuple[int, ...]  # [P, ...]
    run: int  # of a gather; 0: a sum

    def own(self, rank: int, turn: int) -> torch.Tensor:
        """What a rank has at its turn [P, ...]."""
        dice = torch.Generator().manual_seed(97 * turn + rank)
        return torch.randint(-8, 9, self.shape, generator=dice).to(self.dtype)

    def expected(self, size: int, turn: int) -> torch.Tensor:
        ranks = [self.own(rank, turn).double().sum(0) for rank in range(size)]
        if not self.run:
            return sum(ranks[1:], ranks[0]).to(self.dtype)
        runs = torch.stack(ranks).view(size, -1, self.run)  # [N, M, run]
        return runs.transpose(0, 1).to(self.dtype)  # [M, N, run]

    def exchanged(self, exchange: Exchange, own: torch.Tensor) -> torch.Tensor:
        assert exchange.takes(own, sums=not self.run)
        return exchange.gather(own, self.run) if self.run else exchange.sum(own, own[0])


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
]


def make_turns(count: int) -> list[Case]:
    dice = random.Random(5)
    return [*CASES, *(dice.choice(CASES) for _ in range(count))]


def mailboxes(rank: int, memory: torch.Tensor, epoch: int = 0) -> Any:
    """Those of `rank` in `memory` [N, 2, N, SLOT_WORDS], where all ranks' are."""
    device = memory.device
    return triton_exchange.Mailboxes(
        rank=rank,
        size=len(memory),
        addresses=torch.tensor([one.data_ptr() for one in memory], device=device),
        epochs=torch.full((PROGRAMS,), epoch, dtype=torch.int32, device=device),
        alive=torch.ones(1, dtype=torch.int32, device=device),
        slot_words=SLOT_WORDS,
    )


def empty_memory(size: int, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(size, 2, size, SLOT_WORDS, dtype=torch.int64, device=device)


def set_small(round_bytes: int) -> None:
    """Make messages take several rounds of several programs, and sums two rounds from there on."""
    triton_exchange.PROGRAMS, triton_exchange.WORDS = PROGRAMS, WORDS
    triton_exchange.ROUND_BYTES = round_bytes


def _be_rank(
    rank: int, memory: torch.Tensor, turns: list[Case], epoch: int, round_bytes: int, results: Any
) -> None:
    """In a process of its own; hurries and dawdles, and is late where the epoch passes zero."""
    set_small(round_bytes)
    exchange = Exchange(mailboxes(rank, memory, epoch))
    dice = random.Random(rank)
    found = []
    for turn, case in enumerate(turns):
        passes = rank > 0 and epoch + turn + 1 == 0
        time.sleep(0.5 if passes else dice.choice([0, 0, 0.01]))
        found.append(case.exchanged(exchange, case.own(rank, turn)).clone())
    results.put((rank, [one.view(torch.uint8).numpy() for one in found]))


def in_processes(
    size: int, turns: list[Case], epoch: int, round_bytes: int
) -> list[list[torch.Tensor]]:
    context = multiprocessing.get_context("spawn")
    memory = empty_memory(size).share_memory_()
    results = context.Queue()
    processes = [
        context.Process(
            target=_be_rank, args=(rank, memory, turns, epoch, round_bytes, results), daemon=True
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    answers = dict(_get(results, processes) for _ in processes)
    for process in processes:
        process.join(PATIENCE_S)
    return [
        [
            torch.from_numpy(one.copy()).view(case.dtype)
            for case, one in zip(turns, answers[rank], strict=True)
        ]
        for rank in range(size)
    ]


def _get(results: Any, processes: list[Any]) -> Any:
    while all(process.exitcode in (None, 0) for process in processes):
        with contextlib.suppress(queue.Empty):
            return results.get(timeout=1)
    raise RuntimeError("a rank has died")


def on_streams(size: int, turns: list[Case], epoch: int) -> list[list[torch.Tensor]]:
    memory = empty_memory(size, "cuda")
    boxes = [mailboxes(rank, memory, epoch) for rank in range(size)]
    exchanges = [Exchange(box) for box in boxes]
    streams = [torch.cuda.Stream() for _ in range(size)]

    def exchange_all() -> list[list[torch.Tensor]]:
        own = [[case.own(rank, turn).cuda() for turn, case in enumerate(turns)] for rank in ranks]
        torch.cuda.synchronize()
        found: list[list[torch.Tensor]] = [[] for _ in ranks]
        for turn, case in enumerate(turns):
            for rank in ranks:
                with torch.cuda.stream(streams[rank]):
                    found[rank].append(case.exchanged(exchanges[rank], own[rank][turn]))
        torch.cuda.synchronize()
        return found

    ranks = range(size)
    # Without waiting for each other first: no kernel can be loaded while another of this GPU waits.
    for box in boxes:
        box.alive.zero_()
    exchange_all()
    for box in boxes:
        box.alive.fill_(1)
        box.epochs.fill_(epoch)
    memory.zero_()
    return [[one.cpu() for one in of_rank] for of_rank in exchange_all()]
