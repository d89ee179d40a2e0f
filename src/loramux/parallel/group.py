"""The group of ranks, and what they tell each other in a step.

A group is passed around, never looked up: two engines in one process have two. Collectives belong to
the thread that runs the steps.
"""

from __future__ import annotations

import io
import pickle
import threading
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from loramux.parallel.cuts import Stripe

if TYPE_CHECKING:
    from loramux.kernels import LoRASite, WorkList
    from loramux.parallel.exchange import Exchange

# A group waits this long for a rank that is busy; one that has died is noticed at once elsewhere.
PATIENCE = timedelta(hours=1)
LEAVE_S = 10.0  # for the communicator to end
MEETING = timedelta(minutes=2)  # all have come up when they are told to meet


class Group:
    """The ranks of one engine. With one rank every collective returns what it was given."""

    def __init__(
        self, rank: int = 0, size: int = 1, process_group: Any = None, *, staged: bool = False
    ):
        """`staged`: the tensors are on a GPU and the group's transport is not."""
        self.rank = rank
        self.size = size
        self.entered = 0
        """Collectives so far; a graph's count once, when it is captured."""
        self.beside: Group = self
        """For the thread that loads adapters, and CPU tensors; with one rank, the same."""
        self.exchange: Exchange | None = None
        """For small tensors, where GPUs reach each other's memory."""
        self._group = process_group
        self._staged = staged

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place where `tensor` is contiguous."""
        if self.size == 1 or not tensor.numel():
            return tensor
        return self._sum(tensor.contiguous().unsqueeze(0))

    def sum_parts(self, parts: torch.Tensor) -> torch.Tensor:
        """`parts` [P, ...], which are lost -> [...], the sum over P and all ranks."""
        if self.size == 1 or not parts.numel():
            return parts[0] if parts.shape[0] == 1 else parts.sum(0)
        return self._sum(parts)

    def sum_and_expand(
        self, z: torch.Tensor, columns: int, site: LoRASite, work: WorkList
    ) -> torch.Tensor | None:
        """z [T, N + W], behind whose N = `columns` stand shrunk activations -> [T, N], summed over all
        ranks and the delta of the others' sums added; None where that is not one op. `site` has B of
        all columns, or of this rank's share."""
        if self.exchange is None or not self.exchange.takes_delta(z, columns, site, work):
            return None
        self.entered += 1
        return self.exchange.sum_and_expand(z, columns, site, work)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[...] of one shape on all ranks -> [size, ...]."""
        if self.size == 1 or not tensor.numel():
            return tensor.expand(self.size, *tensor.shape)
        parts = tensor.contiguous().unsqueeze(0)  # [1, ...]
        return self._gather(parts, tensor.numel()).view(self.size, *tensor.shape)

    def gather_runs(self, parts: torch.Tensor, run: int) -> torch.Tensor:
        """`parts` [P, T, W], of one shape on all ranks and summed over P -> [T, size * W], the ranks'
        numbers in turn, `run` of each; W is a multiple of it."""
        _, tokens, width = parts.shape
        if self.size == 1:
            return parts.sum(0) if parts.shape[0] > 1 else parts[0]
        if not parts.numel():
            return parts.new_empty(tokens, self.size * width)
        return self._gather(parts, run).view(tokens, self.size * width)

    def gather_columns(self, tensor: torch.Tensor, columns: Stripe) -> torch.Tensor:
        """[T, columns] -> [T, columns.whole], where the ranks' parts are those of `stripe`."""
        if self.size == 1:
            return tensor
        share = -(-columns.whole // self.size)
        if columns.size < share:  # collectives want one shape
            tensor = torch.nn.functional.pad(tensor, (0, share - columns.size))  # [T, share]
        return self.gather_runs(tensor.unsqueeze(0), share)[:, : columns.whole]  # [T, whole]

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite a contiguous `tensor` with rank 0's."""
        if self.size == 1 or not tensor.numel():
            return
        self.entered += 1
        moved = self._there(tensor)
        _wait(self._group.broadcast([moved], _options("BroadcastOptions")))
        self._back(moved, tensor)

    def share(self, value: Any, device: torch.device) -> Any:
        """Rank 0's `value`, which must be picklable, on every rank. Waits; not for the step loop."""
        if self.size == 1:
            return value
        packed = bytearray(pickle.dumps(value))
        length = torch.tensor([len(packed)], device=device)  # [1]
        self.broadcast(length)
        content = torch.zeros(int(length), dtype=torch.uint8, device=device)  # [bytes]
        if self.rank == 0:
            content.copy_(torch.frombuffer(packed, dtype=torch.uint8))
        self.broadcast(content)
        return pickle.load(io.BytesIO(content.cpu().numpy().tobytes()))

    def abort(self) -> None:
        """End what is running and let nobody wait for it; from any thread."""
        if self.exchange is not None:
            self.exchange.abandon()
        if self.beside is not self:
            self.beside.abort()
        group = self._group
        if group is not None and hasattr(group, "abort"):
            group.abort()

    def close(self, wait_s: float = LEAVE_S) -> None:
        """Leave, when the other ranks have left or will. Captured graphs must be gone: a communicator
        that is part of one never ends, and would hold up the end of the process."""
        if self.exchange is not None:
            self.exchange.close()
        if self._group is None or self._staged:
            return
        thread = threading.Thread(target=self._leave, name="group-close", daemon=True)
        thread.start()
        thread.join(wait_s)

    def _leave(self) -> None:
        self.abort()
        self._group = None  # what it still has to ask the store it asks now

    def _sum(self, parts: torch.Tensor) -> torch.Tensor:
        """`parts` [P, ...] -> [...], summed over P and all ranks; a single contiguous part in place, and
        several are lost."""
        self.entered += 1
        if self.exchange is not None and self.exchange.takes(parts, sums=True):
            own = parts.is_contiguous()
            return self.exchange.sum(parts, parts[0] if own else parts.new_empty(parts.shape[1:]))
        parts = parts.contiguous()
        tensor = parts.sum(0) if parts.shape[0] > 1 else parts[0]  # [...]
        moved = self._there(tensor)
        _wait(self._group.allreduce([moved], _options("AllreduceOptions")))
        return self._back(moved, tensor)

    def _gather(self, parts: torch.Tensor, run: int) -> torch.Tensor:
        """`parts` [P, ...], summed over P -> [M, size, run] of M runs of each rank."""
        self.entered += 1
        if self.exchange is not None and self.exchange.takes(parts, sums=False):
            return self.exchange.gather(parts, run)
        parts = parts.contiguous()
        mine = self._there(parts.sum(0) if parts.shape[0] > 1 else parts[0])  # [...]
        of_all = mine.new_empty(self.size * mine.numel())  # [size * ...]
        _wait(self._group._allgather_base(of_all, mine.view(-1), _options("AllgatherOptions")))
        of_all = of_all.to(parts.device).view(self.size, -1, run)  # [size, M, run]
        return of_all.transpose(0, 1).contiguous()  # [M, size, run]

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu() if self._staged else tensor

    def _back(self, moved: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(moved) if self._staged else tensor


@cache
def _options(name: str) -> Any:
    """Options of a collective that runs on the current stream, so that graphs capture it where it
    stands."""
    options = getattr(torch.distributed.distributed_c10d, name)()
    if hasattr(options, "asyncOp"):
        options.asyncOp = False
    return options


def _wait(work: Any) -> None:
    """For a collective; on a GPU only the stream waits."""
    if work is not None:
        work.wait()


ALONE = Group()
"""The group of an engine with one rank."""


class PlannedGroup(Group):
    """Rank 0 of ranks that are not there, for tensors on the meta device: only shapes come out."""

    def _sum(self, parts: torch.Tensor) -> torch.Tensor:
        return parts[0]

    def _gather(self, parts: torch.Tensor, run: int) -> torch.Tensor:
        return parts.new_empty(parts[0].numel() // run, self.size, run)


def join(
    store_path: str,
    rank: int,
    size: int,
    device: torch.device,
    *,
    shared: bool,
    only_nccl: bool = False,
) -> Group:
    """Meet the other ranks over the file `store_path`; waits for all of them.

    NCCL on GPUs of their own, and for small tensors each other's memory, unless `only_nccl`; gloo on
    the loopback on CPUs, and where ranks have `shared` a GPU, which NCCL does not do.
    """
    dist: Any = torch.distributed
    store = dist.FileStore(store_path, size)
    store.set_timeout(MEETING)
    gloo = dist.ProcessGroupGloo._Options()
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    gloo._timeout = PATIENCE
    on_gpus = device.type == "cuda" and not shared
    if on_gpus:
        torch.cuda.set_device(device)
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = PATIENCE
        group = dist.ProcessGroupNCCL(store, rank, size, nccl)
        joined = Group(rank, size, group)
    else:
        group = dist.ProcessGroupGloo(store, rank, size, gloo)
        joined = Group(rank, size, group, staged=device.type == "cuda")
    joined.all_reduce(torch.zeros(1, device=device))  # NCCL connects at the first collective
    beside = dist.ProcessGroupGloo(dist.PrefixStore("beside", store), rank, size, gloo)
    joined.beside = Group(rank, size, beside)
    if on_gpus and not only_nccl:
        mailboxes = dist.PrefixStore("mailboxes", store)
        joined.exchange = _exchange(joined.beside, mailboxes, f"loramux-{store_path}", device)
    return joined


def _exchange(group: Group, store: Any, name: str, device: torch.device) -> Exchange | None:
    """Of the ranks of `group`, a group of CPU tensors."""
    from loramux.parallel.exchange import set_up  # needs Triton

    return set_up(group, store, name, device)
