"""Paged attention by FlashInfer: plans on the host before a step, kernels inside it.

A plan cuts the work of one step into pieces for the GPU's processors. It reads lengths on the host,
writes its lists into a page-locked buffer and queues one small copy of them; nothing waits for the
device. What the kernels themselves read of a step (`PlanBuffers`) is the caller's to fill, with
one copy of its own. A captured decode graph stays right under every later plan for its batch size:
FlashInfer lays a graph's lists out by batch size alone.

FlashInfer's own `plan()` would copy those buffers too. It is called once per wrapper, for it also
chooses and compiles the kernels; later plans call the chosen module, as `fast_decode_plan` does.
That call is not a public interface: `TESTED` names the versions whose order of arguments this is.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from loramux.kernels.flashinfer_sizes import Shape

Kind = tuple[float, int, float]
"""(scaling, window, softcap) of a layer, as `paged_attention` takes them."""

TESTED = ("0.6.14",)
HEAD_DIMS = (64, 128, 256)


def available(
    head_dim: int, v_head_dim: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """None where FlashInfer can be used, else the reason why not."""
    if head_dim != v_head_dim or head_dim not in HEAD_DIMS:
        return f"no kernel for head sizes {head_dim} and {v_head_dim}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"no kernel for {dtype}"
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return "flashinfer-python is not installed"
    if version not in TESTED:
        return f"flashinfer-python {version} is not one of {', '.join(TESTED)}"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a CUDA device of compute capability 8.0 or higher"
    return None


@dataclass(frozen=True, slots=True)
class PlanBuffers:
    """What the kernels read of a step, on the device, int32 and contiguous.

    The caller fills a step's part before it runs: pages of all sequences one after the other."""

    kv_indptr: torch.Tensor
    """[max_batch+1]: where each sequence's pages begin in `kv_indices`."""

    kv_indices: torch.Tensor
    """[max_blocks]: pages; every entry up to kv_indptr[B] must be a block that exists."""

    last_page_len: torch.Tensor
    """[max_batch]: positions in a sequence's last page, 1..block_size."""

    qo_indptr: torch.Tensor
    """[max_batch+1]: where the rows of each sequence of a prefill plan begin, counted from the first
    of them; a decode plan does not look at it."""

    @staticmethod
    def allocate(max_batch: int, max_blocks: int, device: torch.device) -> PlanBuffers:
        """Buffers of their own, for a caller that packs nothing."""
        sizes = (max_batch + 1, max_blocks, max_batch, max_batch + 1)
        return PlanBuffers(*(torch.zeros(n, dtype=torch.int32, device=device) for n in sizes))


class _HostRing:
    """Page-locked buffers in turn; one is written again only when its last copy is done.

    A step takes up to two for each kind; with four the copy waited for is that of the step before
    the last."""

    def __init__(self, count: int, num_bytes: int):
        self._slots = [self._locked(num_bytes) for _ in range(count)]
        self._copied = [torch.cuda.Event() for _ in range(count)]
        self._turn = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """The next buffer, of `num_bytes` or more."""
        self._turn = (self._turn + 1) % len(self._slots)
        self._copied[self._turn].synchronize()
        if self._slots[self._turn].numel() < num_bytes:
            self._slots[self._turn] = self._locked(num_bytes)
        return self._slots[self._turn]

    def sent(self) -> None:
        """The copy out of the buffer taken last has been queued on the current stream."""
        self._copied[self._turn].record()

    @staticmethod
    def _locked(num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


@dataclass(frozen=True, slots=True)
class _Step:
    """The lengths of a step on the host, all int32."""

    kv_indptr: torch.Tensor  # [B+1]
    last_page_len: torch.Tensor  # [B]
    lengths: torch.Tensor  # [B] positions
    qo_indptr: torch.Tensor  # [B+1]
    rows: int

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]


@dataclass(slots=True)
class _Lane:
    """The wrappers of one kind. Their plans share a workspace: one at a time is live."""

    scaling: float
    window_left: int
    softcap: float
    lists: torch.Tensor  # [bytes] captured graphs hold its address
    prefill_lists: torch.Tensor  # [bytes]
    decoders: dict[int, Any] = field(default_factory=dict)  # by captured batch size; 0: uncaptured
    prefill: Any = None
    decoder: Any = None  # of the step planned last


def window_left(window: int) -> int:
    """FlashInfer counts the positions in front of the query's own, -1 for all; we count it in."""
    return window - 1 if window > 0 else -1


class FlashInferPlanner:
    """Plans each step for every kind of layer, and runs the layers by the plans made last."""

    def __init__(
        self,
        device: torch.device,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        kinds: Iterable[Kind],
        max_batch: int,
        max_blocks: int,
        max_rows: int = 0,
        buffers: PlanBuffers | None = None,
        prefill_buffers: PlanBuffers | None = None,
    ):
        """`max_rows`: the largest captured step, if it is larger than `max_batch`; `buffers`: views that
        the caller fills; `prefill_buffers`: others for prefill plans."""
        self._library = importlib.import_module("flashinfer")
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        most = max(max_batch, max_rows)
        self._shape = Shape(num_heads, num_kv_heads, head_dim, max_batch, most, sms)
        self._device, self._dtype, self._block_size = device, dtype, block_size
        self.buffers = buffers or PlanBuffers.allocate(most, max_blocks, device)
        self.prefill_buffers = prefill_buffers or self.buffers
        # Layers follow one another on one stream, so all of them can keep partial results here.
        self._floats = torch.zeros(self._shape.float_bytes(), dtype=torch.uint8, device=device)
        size = self._shape.decode_bytes()
        self._lanes = {
            kind: _Lane(kind[0], window_left(kind[1]), kind[2], self._bytes(size), self._bytes(0))
            for kind in dict.fromkeys(kinds)
        }
        self._ring = _HostRing(4 * len(self._lanes), size)
        self._ramp = torch.arange(most + 1, dtype=torch.int32)  # [max_rows+1]
        self._device_ramp = self._ramp.to(device)  # [max_rows+1]
        self._like = torch.empty(0, dtype=dtype)
        self._decodes = self._rows = 0  # rows of the step planned last

    def _bytes(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.uint8, device=self._device)

    def covers(self, kind: Kind) -> bool:
        """Whether layers of this kind are planned."""
        return kind in self._lanes

    # --- decode --------------------------------------------------------------------------------

    def plan_decode(
        self, batch_size: int, kv_indptr: torch.Tensor, last_page_len: torch.Tensor, graph: bool
    ) -> None:
        """One query row per sequence. Host int32: `kv_indptr` [B+1], `last_page_len` [B].

        `graph`: for the graph captured, or to be captured, at this batch size. Every sequence has
        a page, the padding too. Call it on the stream of the steps, outside of a capture."""
        self._plan_decodes(batch_size, kv_indptr, last_page_len, graph, self.buffers)
        self._decodes = self._rows = batch_size

    def _plan_decodes(
        self,
        batch_size: int,
        kv_indptr: torch.Tensor,
        last_page_len: torch.Tensor,
        graph: bool,
        buffers: PlanBuffers,
    ) -> None:
        ramp = self._ramp[: batch_size + 1]  # [B+1]
        step = self._step(ramp, kv_indptr, last_page_len, batch_size, buffers)
        for lane in self._lanes.values():
            wrapper = lane.decoders.get(batch_size if graph else 0)
            host = self._ring.take(lane.lists.numel())
            # Not cut, the work of a batch size always has the same layout. FlashInfer's own way to
            # keep one for graphs would leave its spare programs without a mark that they are spare.
            padded = graph and not self._whole(batch_size)
            if wrapper is None:
                wrapper = self._first_decode(lane, host, step, padded)
                lane.decoders[batch_size if graph else 0] = wrapper
            else:
                wrapper._plan_info = self._decode_lists(lane, wrapper, host, step, padded)
            self._ring.sent()
            if not padded:
                wrapper._qo_indptr_buf = self._device_ramp[: batch_size + 1]
            self._point(wrapper, buffers, 0, batch_size)
            lane.decoder = wrapper

    def _first_decode(self, lane: _Lane, host: torch.Tensor, step: _Step, graph: bool) -> Any:
        """Make the wrapper and plan in public; this compiles what is not in the library's cache."""
        static = self._step_views(self.buffers, 0, step.batch_size) if graph else (None, None, None)
        wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._floats, "NHD", graph, self._shape.tensor_cores, *static, backend="fa2"
        )
        wrapper._int_workspace_buffer = lane.lists
        wrapper._pin_memory_int_workspace_buffer = host
        wrapper.plan(
            *(step.kv_indptr, self._ramp[:0], step.last_page_len, *self._geometry()),
            disable_split_kv=self._whole(step.batch_size),
            **self._options(lane),
        )
        return wrapper

    def _whole(self, batch_size: int) -> bool:
        """Whether the work of a sequence is not cut, for which there is no room and no need."""
        return self._shape.tensor_cores and batch_size > self._shape.max_batch

    def _decode_lists(
        self, lane: _Lane, wrapper: Any, host: torch.Tensor, step: _Step, graph: bool
    ) -> Any:
        count, (*heads, dim, block_size) = step.batch_size, self._geometry()
        spaces = (self._floats, lane.lists, host)
        if self._shape.tensor_cores:  # the prefill kernel with one row each and nothing masked
            return wrapper._cached_module.plan(
                *(*spaces, step.qo_indptr, step.kv_indptr, step.lengths, count, count),
                *(*heads, block_size, graph, dim, dim, False, lane.window_left),
                *(-1, self._whole(count), 0),
            )
        return wrapper._cached_module.plan(
            *(*spaces, step.kv_indptr, count, *heads, block_size, graph),
            *(lane.window_left, lane.softcap, dim, dim, self._like, self._like),
        )

    # --- prefill -------------------------------------------------------------------------------

    def plan_prefill(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        last_page_len: torch.Tensor,
        total_rows: int,
        decodes: int = 0,
    ) -> None:
        """Any number of rows per sequence. Host int32: `qo_indptr`, `kv_indptr` [B+1],
        `last_page_len` [B]; `total_rows` is qo_indptr[B]. Not for captured graphs.

        The first `decodes` sequences have one row each, for which prefill kernels would take as long
        as for a tile of 128: decode kernels take them."""
        buffers, count = self.prefill_buffers, last_page_len.shape[0]
        if decodes:
            starts, lasts = kv_indptr[: decodes + 1], last_page_len[:decodes]
            self._plan_decodes(decodes, starts, lasts, False, buffers)
        if count > decodes:
            self._plan_rest(
                qo_indptr[decodes:] - decodes, kv_indptr[decodes:], last_page_len[decodes:], decodes
            )
        self._decodes, self._rows = decodes, total_rows

    def _plan_rest(
        self, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, lasts: torch.Tensor, first: int
    ) -> None:
        """The prefill plan of the sequences from `first` on."""
        batch_size, rows, buffers = lasts.shape[0], int(qo_indptr[-1]), self.prefill_buffers
        step = self._step(qo_indptr, kv_indptr, lasts, rows, buffers)
        size = self._shape.prefill_bytes(batch_size, rows)
        for lane in self._lanes.values():
            if lane.prefill_lists.numel() < size:
                lane.prefill_lists = self._bytes(1 << (size - 1).bit_length())
            host = self._ring.take(lane.prefill_lists.numel())
            if lane.prefill is None:
                lane.prefill = self._first_prefill(lane, host, step)
            else:
                self._prefill_again(lane, lane.prefill, host, step)
            self._ring.sent()
            lane.prefill._qo_indptr_buf = buffers.qo_indptr[: batch_size + 1]
            self._point(lane.prefill, buffers, first, batch_size)

    def _first_prefill(self, lane: _Lane, host: torch.Tensor, step: _Step) -> Any:
        """As `_first_decode`. Left to itself the library takes FA3 on Hopper and FA2 elsewhere."""
        wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(self._floats, "NHD")
        wrapper._int_workspace_buffer = lane.prefill_lists
        wrapper._pin_memory_int_workspace_buffer = host
        wrapper.plan(
            *(step.qo_indptr, step.kv_indptr, self._ramp[:0], step.last_page_len),
            *self._geometry(),
            causal=True,
            **self._options(lane),
        )
        return wrapper

    def _prefill_again(self, lane: _Lane, wrapper: Any, host: torch.Tensor, step: _Step) -> None:
        *heads, dim, block_size = self._geometry()
        wrapper._int_workspace_buffer = lane.prefill_lists  # it may have grown
        wrapper._qo_indptr_last = step.rows  # what `run` compares the queries with
        splitting = (-1, False, 0) if wrapper._backend == "fa2" else ()
        wrapper._plan_info = wrapper._cached_module.plan(
            *(self._floats, lane.prefill_lists, host),
            *(step.qo_indptr, step.kv_indptr, step.lengths, step.rows, step.batch_size),
            *(*heads, block_size, False, dim, dim, True, lane.window_left, *splitting),
        )

    # --- both ----------------------------------------------------------------------------------

    def run(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, kind: Kind
    ) -> torch.Tensor:
        """`q` [T, H, D] over caches [num_blocks, block_size, Hkv, D] by the last plan -> [T, H, D].

        It can be captured once it has run on the plan of its batch size."""
        lane, count, caches = self._lanes[kind], self._decodes, (k_cache, v_cache)
        if not self._rows or q.shape[0] != self._rows:
            raise RuntimeError(f"no plan for {q.shape[0]} rows. This is a bug.")
        out = torch.empty_like(q)  # [T, H, D] FlashInfer's own would be filled with zeros first
        if count:
            lane.decoder.run(q[:count], caches, out=out[:count])
        if count < self._rows:
            lane.prefill.run(q[count:], caches, out=out[count:])
        return out

    def _geometry(self) -> tuple[int, int, int, int]:
        shape = self._shape
        return shape.num_heads, shape.num_kv_heads, shape.head_dim, self._block_size

    def _options(self, lane: _Lane) -> dict[str, Any]:
        return {
            "window_left": lane.window_left,
            "logits_soft_cap": lane.softcap,
            "q_data_type": self._dtype,
            "sm_scale": lane.scaling,
        }

    def _step(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        last_page_len: torch.Tensor,
        rows: int,
        buffers: PlanBuffers,
    ) -> _Step:
        batch_size, room = last_page_len.shape[0], buffers.kv_indices.shape[0]
        _expect(qo_indptr, batch_size + 1)
        _expect(kv_indptr, batch_size + 1)
        _expect(last_page_len, batch_size)
        pages = int(kv_indptr[-1])
        if batch_size > buffers.last_page_len.shape[0] or pages > room:
            raise ValueError(f"{batch_size} sequences with {pages} pages do not fit the buffers")
        lengths = (kv_indptr[1:] - kv_indptr[:-1] - 1).clamp_(min=0)  # [B] full pages
        lengths.mul_(self._block_size).add_(last_page_len)  # [B] positions
        return _Step(kv_indptr, last_page_len, lengths, qo_indptr, rows)

    def _step_views(self, buffers: PlanBuffers, first: int, count: int) -> tuple[torch.Tensor, ...]:
        """[B+1], [max_blocks], [B]: what a wrapper of the sequences from `first` on reads."""
        end = first + count
        starts, lasts = buffers.kv_indptr[first : end + 1], buffers.last_page_len[first:end]
        return starts, buffers.kv_indices, lasts

    def _point(self, wrapper: Any, buffers: PlanBuffers, first: int, count: int) -> None:
        starts, pages, lasts = self._step_views(buffers, first, count)
        wrapper._paged_kv_indptr_buf = starts
        wrapper._paged_kv_indices_buf = pages
        wrapper._paged_kv_last_page_len_buf = lasts


def _expect(tensor: torch.Tensor, length: int) -> None:
    """A device tensor here would mean a wait in every step."""
    if tensor.device.type != "cpu" or tensor.dtype != torch.int32 or tensor.shape != (length,):
        raise ValueError(f"expected {length} int32 on the host, got {tensor.dtype} {tensor.shape}")
