"""Adapters from host memory to a GPU while the steps go on: nothing here waits for their stream.

    host buffer ──> pinned ring ──> staging ──────> scatter ──────> event
       (memcpy)        (copy engine)     (one kernel, after the last step to read there)
    └──  threads  ──┘└──────────── a stream of its own ───────────┘

Only the thread that loads waits, and for that event alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from loramux.adapters.weights import AdapterWeights, StoredExperts
from loramux.engine.plan import AdapterLoad
from loramux.engine.ring import CHUNK_BYTES, CHUNKS, Ring
from loramux.errors import AdapterLoadFailed
from loramux.kernels import LoRASite
from loramux.kernels.triton_scatter import (
    ExpertSource,
    ScatterTable,
    SliceSource,
    Sources,
    scatter,
)
from loramux.schema import ModelSchema

STAGING_STEP = 32 << 20  # staging grows in these, so that similar adapters share one
TABLE_ALIGNMENT = 128


class DeviceLoader:
    """Writes adapters into the rank rows of `sites`, whose tensors must stay where they are."""

    def __init__(
        self,
        device: torch.device,
        sites: Sequence[LoRASite],
        schema: ModelSchema,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        chunks: int = CHUNKS,
    ):
        self._device = device
        self._modules = {m.name: (m.site, m.slice_index) for m in schema.modules.values()}
        self._table = ScatterTable(sites)
        self._staging: torch.Tensor | None = None  # [bytes] uint8
        self._lock = threading.Lock()
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)
            # Waiting on them puts the thread to sleep: it would spin beside the step loop's.
            self._done = torch.cuda.Event(blocking=True)
            free = [torch.cuda.Event(blocking=True) for _ in range(chunks)]
            self._ring = Ring(free, chunk_bytes=chunk_bytes)
            self._prepare()

    @torch.inference_mode()
    def load(
        self,
        load: AdapterLoad,
        weights: AdapterWeights,
        after: torch.cuda.Event | None = None,
        affine: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> None:
        """Write `weights` into the rows of `load`, and gains and shifts `affine`, (where, what) each;
        they are there when this returns.

        `after` is the event of the newest step that reads what stood there, if one still may.
        Raises AdapterLoadFailed when the GPU has no memory for it.
        """
        with self._ours(load.ref.name):
            self._queue(load, weights, after)
            for place, vectors in affine:
                place.copy_(vectors, non_blocking=True)
            self._done.record(self._stream)
            self._done.synchronize()

    @torch.inference_mode()
    def rehearse(self, weights: AdapterWeights) -> None:
        """Have the memory that a load takes. Raises AdapterLoadFailed when there is none."""
        with self._ours(weights.ref.name):
            self._stage(weights)

    @torch.inference_mode()
    def write(
        self, name: str, write: Callable[[], None], after: torch.cuda.Event | None = None
    ) -> None:
        """Let `write` copy what adapter `name` has beside its rank rows; it is there when this returns.

        `after` and errors as `load` has them."""
        with self._ours(name):
            if after is not None:
                self._stream.wait_event(after)
            write()
            self._done.record(self._stream)
            self._done.synchronize()

    @contextmanager
    def _ours(self, name: str) -> Iterator[None]:
        """The stream and all that stands beside it, for adapter `name`."""
        with self._lock, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            try:
                yield
            except torch.OutOfMemoryError as error:
                raise AdapterLoadFailed(
                    f"there is not enough GPU memory to load adapter {name!r}",
                    remedy="lower gpu_memory_utilization to leave more of it free",
                ) from error

    def _stage(self, weights: AdapterWeights) -> tuple[torch.Tensor, int]:
        """Staging memory for an adapter, and where in it its table starts."""
        size = weights.layout.layer_bytes
        table_at = -(-size // TABLE_ALIGNMENT) * TABLE_ALIGNMENT
        return self._reserve(table_at + self._table.num_bytes), table_at

    def _queue(
        self, load: AdapterLoad, weights: AdapterWeights, after: torch.cuda.Event | None
    ) -> None:
        staging, table_at = self._stage(weights)  # [bytes]
        self._send(weights.buffer[: weights.layout.layer_bytes], staging, 0)
        work = self._table.fill(
            self._sources(weights), staging.data_ptr(), load.first_row, load.ref.max_r
        )
        self._send(work.table.view(torch.uint8).view(-1), staging, table_at)
        if after is not None:
            self._stream.wait_event(after)
        table = staging[table_at : table_at + self._table.num_bytes].view(torch.int64)
        scatter(work, table.view(work.table.shape))  # [E, COLUMNS]

    def _sources(self, weights: AdapterWeights) -> Sources:
        linear = {
            self._modules[name]: SliceSource(
                pair.a.offset, pair.a.dtype, pair.b.offset, pair.b.dtype, pair.a.rows, pair.scale
            )
            for name, pair in weights.layout.pairs.items()
        }
        experts = {
            self._modules[name]: _expert_source(stored)
            for name, stored in weights.layout.experts.items()
        }
        return {**linear, **experts}

    def _send(self, host: torch.Tensor, staging: torch.Tensor, at: int) -> None:
        """Copy `host` [bytes] to staging[at:]; the last of it is on its way when this returns."""

        def pass_on(start: int, pinned: torch.Tensor) -> None:
            place = at + start
            staging[place : place + pinned.numel()].copy_(pinned, non_blocking=True)

        self._ring.send(host, pass_on, self._stream)

    def _reserve(self, size: int) -> torch.Tensor:
        """Staging memory of this stream, which nothing uses: a load waits for its own end."""
        if self._staging is None or self._staging.numel() < size:
            self._staging = None  # the old one first: the allocator may make it part of the new
            rounded = -(-size // STAGING_STEP) * STAGING_STEP
            self._staging = torch.empty(rounded, dtype=torch.uint8, device=self._device)
        return self._staging

    def _prepare(self) -> None:
        """Compile the kernel, which takes seconds, and wait for the zeros of the pool."""
        work = self._table.fill({}, 0, 0, 0)
        table = work.table.to(self._device)  # [E, COLUMNS]: no rows at all
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            scatter(work, table)
        self._stream.synchronize()


def _expert_source(stored: StoredExperts) -> ExpertSource:
    a, b = stored.a, stored.b
    return ExpertSource(
        *(a.offsets, (a.row_strides, a.column_strides), a.dtype),
        *(b.offsets, (b.row_strides, b.column_strides), b.dtype),
        *(stored.r, stored.scales, stored.out_features),
        alternating=b.alternating,
    )
