"""The ranks' mailboxes: memory of each GPU that the others write into.

Small collectives take as long as a message is on its way. NCCL's take 8 to 13 us where the kernel of
`kernels.triton_exchange` takes 3, and there are hundreds in a step. torch's symmetric memory makes the
mailboxes; where it cannot, or the GPUs do not reach each other, or a trial goes wrong, there are none,
and everything goes through NCCL.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from loramux.kernels import LoRASite, WorkList, triton_sum_expand, triton_sum_expand_in_two
from loramux.kernels.triton_exchange import (
    ELEMENTS,
    PROGRAMS,
    Mailboxes,
    exchange_gather,
    exchange_sum,
    most_words,
    words_of,
)
from loramux.parallel.numbered_store import NumberedStore

if TYPE_CHECKING:
    from loramux.parallel.group import Group

logger = logging.getLogger(__name__)

SENT_BYTES = 4 << 20
"""The most that a rank sends in an exchange, to all others together; NCCL moves more sooner."""

TRIAL, TRIAL_S = 5000, 60.0
"""Numbers of a small message in the trial, and how long it may take; kernels are compiled in it."""


class Exchange:
    """Sums and gathers of small tensors, on one stream."""

    def __init__(
        self, mailboxes: Mailboxes, memory: Any = None, leave: Callable[[], None] = lambda: None
    ):
        """`memory` is kept for as long as this is; `leave` gives up what belongs to the group."""
        self._mailboxes = mailboxes
        self._memory = memory
        self._leave: Callable[[], None] | None = leave
        on_gpu = mailboxes.alive.is_cuda
        self._aside = torch.cuda.Stream(mailboxes.alive.device) if on_gpu else None
        spare = mailboxes.alive.clone()
        self._end(spare)  # so that nothing has to be loaded when it matters
        if self._aside is not None:
            self._aside.synchronize()

    def takes(self, parts: torch.Tensor, *, sums: bool) -> bool:
        """Whether `parts` [P, ...] can be summed, or gathered, and sooner than by NCCL."""
        several = parts.shape[0] > 1
        if (sums or several) and parts.dtype not in ([torch.float32] if several else ELEMENTS):
            return False
        return 0 < words_of(parts)[0] <= most_words(self._mailboxes, sums=sums)

    @property
    def most_words(self) -> int:
        """32-bit words of the largest sum."""
        return most_words(self._mailboxes, sums=True)

    def sum(self, parts: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`parts` [P, ...] of all ranks and of all P -> `out` [...], which may be parts[0]."""
        exchange_sum(parts, out, self._mailboxes)
        return out

    def gather(self, parts: torch.Tensor, run: int) -> torch.Tensor:
        """`parts` [P, ...], summed over P -> [M, N, run] of M runs of each rank."""
        runs = parts[0].numel() // run
        out = parts.new_empty(runs, self._mailboxes.size, run)  # [M, N, run]
        exchange_gather(parts, run, out, self._mailboxes)
        return out

    def can_take_delta(self, z: torch.Tensor, columns: int, site: LoRASite, work: WorkList) -> bool:
        """Whether `sum_and_expand` can."""
        step = (z, columns, site, work, self._mailboxes)
        return triton_sum_expand.can_take(*step) or triton_sum_expand_in_two.can_take(*step)

    def takes_delta(self, z: torch.Tensor, columns: int, site: LoRASite, work: WorkList) -> bool:
        """Whether `sum_and_expand` can, and sooner than one op after the other."""
        step = (z, columns, site, work, self._mailboxes)
        if triton_sum_expand.can_take(*step):
            return triton_sum_expand.is_sooner(z, site)
        two = triton_sum_expand_in_two
        return two.can_take(*step) and two.is_sooner(z, columns, self._mailboxes)

    def sum_and_expand(
        self, z: torch.Tensor, columns: int, site: LoRASite, work: WorkList
    ) -> torch.Tensor:
        """z [T, N + W] of all ranks, products of N = `columns` and shrunk activations -> [T, N] with
        delta. The site has B [R, N], or of it this rank's share of the columns."""
        step = (z, columns, site, work, self._mailboxes)
        if triton_sum_expand.can_take(*step):
            return triton_sum_expand.sum_and_expand(z, site, work, self._mailboxes)
        return triton_sum_expand_in_two.sum_and_expand_in_two(*step)

    def abandon(self) -> None:
        """Let no exchange wait any more, and none that comes; from any thread."""
        self._end(self._mailboxes.alive)

    def _end(self, alive: torch.Tensor) -> None:
        """Zero `alive` while kernels run."""
        if self._aside is None:
            alive.zero_()
            return
        with torch.cuda.stream(self._aside):
            alive.zero_()

    def close(self) -> None:
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


def slot_words(size: int) -> int:
    """Words of what a rank sends to each of the others at most."""
    return SENT_BYTES // (size - 1) // 4 // 128 * 128


def set_up(group: Group, store: Any, name: str, device: torch.device) -> Exchange | None:
    """The exchange of `group`, a `Group` of CPU tensors; None where there can be none, on every rank.
    Waits for all ranks. `name` is the group's in this process."""
    why = _out_of_reach(group, device)
    exchange = None
    if _agree(group, why is None):
        try:
            exchange = _open(group, store, name, device)
        except Exception as error:  # whatever torch finds missing
            why = str(error)
        if _agree(group, exchange is not None) and exchange is not None:
            try:
                why = _try(exchange, group.rank, group.size, device)
            except Exception as error:  # of Triton's compiler, say
                why = str(error)
            if _agree(group, why is None):
                return exchange
    if exchange is not None:
        exchange.abandon()
        exchange.close()
    logger.warning(
        "GPUs do not write into each other's memory (%s): small collectives go through NCCL",
        why or "another rank cannot",
    )
    return None


def _agree(group: Group, well: bool) -> bool:
    """Whether it is well on every rank."""
    return int(group.all_reduce(torch.tensor([int(not well)]))) == 0


def _out_of_reach(group: Group, device: torch.device) -> str | None:
    """Why GPUs cannot write to each other; None if they can."""
    assert device.index is not None
    indices = group.all_gather(torch.tensor([device.index])).flatten().tolist()  # [N]
    for other in indices:
        if other != device.index and not torch.cuda.can_device_access_peer(device.index, other):
            return f"GPU {device.index} does not reach GPU {other}"
    return None


def _open(group: Group, store: Any, name: str, device: torch.device) -> Exchange:
    c10d: Any = torch._C._distributed_c10d
    store = NumberedStore(store)
    owner = c10d.ProcessGroup(store, group.rank, group.size)  # of which only name and store matter
    owner._set_group_name(name)
    c10d._register_process_group(name, owner)
    try:
        mailboxes, memory = _allocate(group.rank, group.size, name, device)
    except Exception:
        c10d._unregister_process_group(name)
        raise
    return Exchange(mailboxes, (memory, store), lambda: c10d._unregister_process_group(name))


def _allocate(rank: int, size: int, name: str, device: torch.device) -> tuple[Mailboxes, Any]:
    """The mailboxes, and what keeps them."""
    # Multicast memory needs more of a machine and serves nothing here.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    memory: Any = torch._C._distributed_c10d._SymmetricMemory
    words = slot_words(size)
    mailbox = memory.empty_strided_p2p((2 * size * words * 8,), [1], torch.uint8, device, name)
    mailbox.zero_()
    torch.cuda.synchronize(device)  # before the others know where it is
    handle = memory.rendezvous(mailbox, name)
    mailboxes = Mailboxes(
        rank=rank,
        size=size,
        addresses=torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=device),
        epochs=torch.zeros(PROGRAMS, dtype=torch.int32, device=device),
        alive=torch.ones(1, dtype=torch.int32, device=device),
        slot_words=words,
    )
    return mailboxes, (mailbox, handle)


def _try(exchange: Exchange, rank: int, size: int, device: torch.device) -> str | None:
    """Exchange numbers that every rank knows, three times so that both halves are used again. What is
    wrong with them, if anything."""
    numbers = torch.arange(exchange.most_words, device=device).remainder(1000).float()
    found = []
    for turn in range(3):
        own = (numbers * (rank + 1) + turn).unsqueeze(0)  # [1, W]
        few = own[:, :TRIAL].clone()  # [1, TRIAL]
        gathered = exchange.gather(few, TRIAL)[0]  # [N, TRIAL]
        found.append((gathered, exchange.sum(few, few[0]), exchange.sum(own, own[0])))
    if not _come(device):
        exchange.abandon()
        return "nothing came in a trial"
    ranks = torch.arange(1, size + 1, dtype=torch.float32, device=device)
    for turn, (gathered, few, many) in enumerate(found):
        wanted = numbers * ranks[:, None] + turn  # [N, W]
        total = wanted.sum(0)  # [W]
        same = torch.equal(gathered, wanted[:, :TRIAL]) and torch.equal(few, total[:TRIAL])
        if not (same and torch.equal(many, total)):
            return "other numbers came than were sent"
    return None


def _come(device: torch.device) -> bool:
    """Whether what was launched is done in time."""
    if device.type != "cuda":
        return True
    event = torch.cuda.Event()
    event.record()
    deadline = time.monotonic() + TRIAL_S
    while not event.query():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True
