"""Tensor parallelism: the group of ranks, and the one rule that cuts W, A and B of a linear layer.

    column  W [out, in] cut along out         row  W cut along in
    rank 0  ▒▒▒▒▒▒▒▒                               ▒▒▒▒░░░░   each rank's product is a partial sum,
    rank 1  ░░░░░░░░                               ▒▒▒▒░░░░   added up by an all-reduce

A group is passed around, never looked up: two engines in one process have two. Collectives belong to
the thread that runs the steps.
"""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch

Kind = Literal["whole", "column", "row"]

# transformers' names of styles -> (how W is cut, whether the layer's outer side is whole on every rank)
STYLES: dict[str, tuple[Kind, bool]] = {
    "colwise": ("column", False),
    "colwise_gather_output": ("column", True),
    "colwise_rep": ("column", True),
    "rowwise": ("row", False),
    "rowwise_split_input": ("row", True),
    "rowwise_rep": ("row", True),
    "replicated_with_grad_allreduce": ("whole", False),
}

# A group waits this long for a rank that is busy; one that has died is noticed at once elsewhere.
PATIENCE = timedelta(hours=1)
LEAVE_S = 10.0  # for the communicator to end
MEETING = timedelta(minutes=2)  # all have come up when they are told to meet


@dataclass(frozen=True, slots=True)
class Stripe:
    """Places [start, stop) of a dimension of `whole` places."""

    start: int
    stop: int
    whole: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


def all_of(whole: int) -> Stripe:
    """The stripe that is the whole dimension."""
    return Stripe(0, whole, whole)


def stripe(whole: int, size: int, rank: int, unit: int = 1) -> Stripe:
    """This rank's part of `whole` places in units that stay together: ceil(units / size) units a
    rank, fewer on the last ones. Raises ValueError when a rank would get none."""
    units = whole // unit
    share = -(-units // size)
    if units * unit != whole or share * (size - 1) >= units:
        raise ValueError(f"{units} parts of {unit} cannot be dealt out to {size} ranks")
    start = share * rank
    return Stripe(start * unit, min(units, start + share) * unit, whole)


def head_stripe(whole: int, size: int, rank: int, unit: int) -> Stripe:
    """As `stripe`, in heads of `unit` places: the same number on each rank, or, where there are fewer
    heads than ranks, one head on several. Raises ValueError when neither comes out even."""
    heads = whole // unit
    if heads % size == 0:
        return stripe(whole, size, rank, unit)
    if heads * unit != whole or size % heads:
        raise ValueError(f"{heads} heads cannot be dealt out evenly to {size} ranks")
    head = rank * heads // size
    return Stripe(head * unit, (head + 1) * unit, whole)


@dataclass(frozen=True, slots=True)
class Cut:
    """What one rank holds of a linear layer W [out, in], and of A [r, in] and B [out, r] on it.

                        W                A                 B
    column, default     rows `output`    whole             rows `b_output` = `output`
    column, fully       the same         every N-th row    the same
    row, default        columns `input`  columns `input`   whole
    row, fully          the same         the same          rows `b_output`
    """

    kind: Kind
    output: Stripe
    input: Stripe
    b_output: Stripe
    deal: int = 1
    """Rank row k of A is on rank k % deal; 1: all of them are here."""

    outside: bool = False
    """Whether the layer takes and gives whole vectors: a column layer then gathers its output, a row
    layer takes its part of the input."""


def cut_linear(
    style: str | None,
    shape: tuple[int, int],
    size: int,
    rank: int,
    *,
    head: int = 0,
    fully: bool = False,
) -> Cut:
    """The part of rank `rank` of `size` of a layer of `shape` (out, in) under transformers' `style`.

    `head` > 0: its features are heads of so many, which stay together. `fully`: `fully_sharded_loras`.
    Raises ValueError with the reason when it cannot be cut so.
    """
    out_features, in_features = shape
    outputs, inputs = all_of(out_features), all_of(in_features)
    if style is not None and style not in STYLES:
        raise ValueError(f"the style {style!r} is not served")
    kind, outside = STYLES[style] if style is not None else ("whole", False)
    if kind == "column":
        heads = head_stripe(out_features, size, rank, head) if head else None
        part = heads or stripe(out_features, size, rank)
        return Cut(kind, part, inputs, part, size if fully else 1, outside)
    if kind == "row":
        if head and in_features // head % size:  # a head on two ranks would count twice
            raise ValueError(
                f"{in_features // head} heads cannot be dealt out evenly to {size} ranks"
            )
        part = stripe(in_features, size, rank, head or 1)
        b_output = stripe(out_features, size, rank) if fully else outputs
        return Cut(kind, outputs, part, b_output, 1, outside)
    return Cut("whole", outputs, inputs, outputs)


class Travelling:
    """A collective that has begun."""

    __slots__ = ("_held", "_result", "_work")

    def __init__(
        self,
        held: torch.Tensor,
        work: Any = None,
        result: Callable[[], torch.Tensor] | None = None,
    ):
        """`held` stays in memory until `wait`, and is the result where no `result` makes one."""
        self._held = held
        self._work = work
        self._result = result

    def wait(self) -> torch.Tensor:
        """What came of it. On a GPU only the stream waits."""
        if self._work is not None:
            self._work.wait()
        return self._held if self._result is None else self._result()


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
        self._group = process_group
        self._staged = staged

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place where `tensor` is contiguous."""
        return self.start_all_reduce(tensor, beside=False).wait()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[...] of one shape on all ranks -> [size, ...]."""
        return self.start_all_gather(tensor, beside=False).wait()

    def start_all_reduce(self, tensor: torch.Tensor, *, beside: bool = True) -> Travelling:
        """`all_reduce`, begun. With `beside` it runs beside what the stream is given until it is waited
        for; until then nobody may touch `tensor`, and no other collective may begin."""
        if self.size == 1 or not tensor.numel():
            return Travelling(tensor)
        self.entered += 1
        tensor = tensor.contiguous()
        moved = self._there(tensor)
        work = self._group.allreduce([moved], _options("AllreduceOptions", beside))
        return Travelling(moved, work, lambda: self._back(moved, tensor))

    def start_all_gather(self, tensor: torch.Tensor, *, beside: bool = True) -> Travelling:
        """`all_gather`, begun; as `start_all_reduce`."""
        if self.size == 1 or not tensor.numel():
            return Travelling(tensor.expand(self.size, *tensor.shape))
        self.entered += 1
        mine = self._there(tensor.contiguous())
        flat = mine.new_empty(self.size * mine.numel())  # [size * ...]
        options = _options("AllgatherOptions", beside)
        work = self._group._allgather_base(flat, mine.view(-1), options)
        shape = (self.size, *tensor.shape)
        return Travelling(mine, work, lambda: flat.view(shape).to(tensor.device))  # [size, ...]

    def gather_columns(self, tensor: torch.Tensor, columns: Stripe) -> torch.Tensor:
        """[T, columns] -> [T, columns.whole], where the ranks' parts are those of `stripe`."""
        if self.size == 1:
            return tensor
        share = -(-columns.whole // self.size)
        if columns.size < share:  # collectives want one shape
            tensor = torch.nn.functional.pad(tensor, (0, share - columns.size))  # [T, share]
        parts = self.all_gather(tensor)  # [size, T, share]
        return parts.transpose(0, 1).flatten(1)[:, : columns.whole]  # [T, whole]

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite a contiguous `tensor` with rank 0's."""
        if self.size == 1 or not tensor.numel():
            return
        self.entered += 1
        moved = self._there(tensor)
        options = _options("BroadcastOptions")
        options.rootRank = 0
        Travelling(moved, self._group.broadcast([moved], options)).wait()
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
        if self.beside is not self:
            self.beside.abort()
        if self._group is not None and hasattr(self._group, "abort"):
            self._group.abort()

    def close(self, wait_s: float = LEAVE_S) -> None:
        """Leave, when the other ranks have left or will. Captured graphs must be gone: a communicator
        that is part of one never ends, and would hold up the end of the process."""
        if self._group is None or self._staged:
            return
        thread = threading.Thread(target=self.abort, name="group-close", daemon=True)
        thread.start()
        thread.join(wait_s)

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu() if self._staged else tensor

    def _back(self, moved: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(moved) if self._staged else tensor


def _options(name: str, beside: bool = False) -> Any:
    """Options of a collective that runs on the current stream, so that graphs capture it where it
    stands; or, `beside` that, on NCCL's own."""
    options = getattr(torch.distributed.distributed_c10d, name)()
    if hasattr(options, "asyncOp"):
        options.asyncOp = beside
    return options


ALONE = Group()
"""The group of an engine with one rank."""


class PlannedGroup(Group):
    """Rank 0 of ranks that are not there, for tensors on the meta device: only shapes come out."""

    def start_all_reduce(self, tensor: torch.Tensor, *, beside: bool = True) -> Travelling:
        return Travelling(tensor)

    def start_all_gather(self, tensor: torch.Tensor, *, beside: bool = True) -> Travelling:
        return Travelling(tensor.new_empty(self.size, *tensor.shape))  # [size, ...]


def join(store_path: str, rank: int, size: int, device: torch.device, *, shared: bool) -> Group:
    """Meet the other ranks over the file `store_path`; waits for all of them.

    NCCL on GPUs of their own; gloo on the loopback on CPUs, and where ranks have `shared` a GPU, which
    NCCL does not do.
    """
    dist: Any = torch.distributed
    store = dist.FileStore(store_path, size)
    store.set_timeout(MEETING)
    gloo = dist.ProcessGroupGloo._Options()
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    gloo._timeout = PATIENCE
    if device.type == "cuda" and not shared:
        torch.cuda.set_device(device)
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = PATIENCE
        # A product fills the GPU: what travels beside it would else come in when that is done.
        nccl.is_high_priority_stream = True
        group = dist.ProcessGroupNCCL(store, rank, size, nccl)
        joined = Group(rank, size, group)
    else:
        group = dist.ProcessGroupGloo(store, rank, size, gloo)
        joined = Group(rank, size, group, staged=device.type == "cuda")
    joined.all_reduce(torch.zeros(1, device=device))  # NCCL connects at the first collective
    beside = dist.ProcessGroupGloo(dist.PrefixStore("beside", store), rank, size, gloo)
    joined.beside = Group(rank, size, beside)
    return joined
