"""Small steps captured once and replayed: one launch instead of hundreds.

A graph is right for every step that its key covers, whatever adapters are in it: what differs from
step to step is read from the packed buffer on the device. Keys are few: numbers of tokens, times how
many pool rows the base product takes along, times (with `specialize_active_lora`) how many compositions
there can be.
"""

from __future__ import annotations

import bisect
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from loramux.config.graphs import affine_buckets

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GraphKey:
    """What is fixed in a graph. `active` bounds the compositions with adapters; with `adapters`
    False there are none and their kernels are not in the graph. `kept` are the rows that logits are
    made of, those that the step keeps first; None: all. With `affine` adapters may have gains and
    shifts; with `outer` embedding and head are outside, see `engine/outer_steps.py`."""

    tokens: int
    adapters: bool = False
    base_rows: int = 0
    active: int = 0
    kept: int | None = None
    affine: bool = False
    outer: bool = False

    def keeping(self, most: int) -> GraphKey:
        """The same of steps that keep at most so many rows."""
        return replace(self, kept=most if self.tokens > most else None)


def graph_keys(
    sizes: Sequence[int],
    places: Sequence[int],
    bounds: Sequence[int],
    *,
    sequences: int,
    outer: bool,
) -> list[GraphKey]:
    """All that are captured: without adapters; and with them (`places`: numbers of pool rows in the base
    product, none where no adapters are served) for any number of compositions and for each of
    `bounds`, for some places once more for those with gains and shifts, and, with `outer`, for those
    that change the vocabulary, which may have them as well. `sequences` may decode together."""
    keys = [GraphKey(size) for size in sizes]
    for size in sizes:
        affine = [0, *affine_buckets(places[1:], size, sequences)]
        for rows in places:
            keys += [GraphKey(size, True, rows, n) for n in [0, *bounds] if n <= size]
            keys += [GraphKey(size, True, rows, affine=True)] if rows in affine else []
            keys += [GraphKey(size, True, rows, affine=True, outer=True)] if outer else []
    return keys


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Of the rows kept: logits [B, V], the likeliest tokens [B]; and the step's ids [T]."""

    logits: torch.Tensor
    greedy: torch.Tensor
    ids: torch.Tensor

    def take(self, rows: slice | torch.Tensor) -> StepOutput:
        """Those rows [B], of a step that kept every token."""
        return StepOutput(self.logits[rows], self.greedy[rows], self.ids[rows])


@dataclass(frozen=True, slots=True)
class Captured:
    graph: torch.cuda.CUDAGraph
    output: StepOutput


class StepGraphs:
    """Graphs by key. `prepare` makes the device ready for a step of a key (plans, contents),
    `forward` runs it on the static buffers."""

    def __init__(
        self,
        sizes: Sequence[int],
        prepare: Callable[[GraphKey], None],
        forward: Callable[[GraphKey], StepOutput],
    ):
        self.sizes = sorted(sizes)
        self._prepare = prepare
        self._forward = forward
        self._graphs: dict[GraphKey, Captured] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    def size_for(self, tokens: int) -> int | None:
        """The smallest captured size that holds `tokens`; None: run it without a graph."""
        at = bisect.bisect_left(self.sizes, tokens)
        return self.sizes[at] if at < len(self.sizes) else None

    def get(self, key: GraphKey) -> Captured | None:
        """The graph of `key`, if it has been captured."""
        return self._graphs.get(key)

    def capture_all(self, keys: Iterable[GraphKey], *, alone: bool = True) -> None:
        """Capture what is missing of `keys`, the largest first so that the rest fits in its memory.

        `alone`: no other rank has to capture the same. Then steps with prompts may fail, whose size is
        left out."""
        missing = sorted(set(keys) - set(self._graphs), key=lambda key: -key.tokens)
        for key in track(
            missing,
            "capturing steps",
            disable=not sys.stderr.isatty(),
            console=Console(stderr=True),
        ):
            if key.tokens not in self.sizes:
                continue
            try:
                self.capture(key)
            except torch.OutOfMemoryError:
                raise
            except Exception:
                if key.kept is None or not alone:
                    raise
                logger.exception("steps of %d tokens cannot be captured", key.tokens)
                self.sizes = [size for size in self.sizes if size != key.tokens]

    @torch.inference_mode()
    def capture(self, key: GraphKey) -> Captured:
        """Run once, so that kernels are compiled and libraries are ready; then record."""
        self._prepare(key)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward(key)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = self._forward(key)
        self._pool = self._pool or graph.pool()
        captured = self._graphs[key] = Captured(graph, output)
        return captured

    def clear(self) -> None:
        """Give up all graphs. A communicator cannot end while one that it takes part in is there."""
        for captured in self._graphs.values():
            captured.graph.reset()
        self._graphs.clear()
