"""The GPU's runner with its steps in view; on a CPU, with graphs that run their step once more.

So one test covers both devices: packed buffers, keys, bounds and padding are the same, and only the
recording itself needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from loramux.config.memory import captured_sizes
from loramux.engine import engine as engine_module
from loramux.engine import gpu_runner
from loramux.engine.graphs import Captured, GraphKey, StepGraphs, StepOutput
from loramux.engine.lora_choice import LoRAChoice
from loramux.engine.plan import AdapterLoad, Row
from loramux.kernels import AttentionBatch
from loramux.layers.batch import LoRAStep

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass(frozen=True)
class Event:
    """Something the runner did: `replay` (of `key`), `eager` or `load`."""

    kind: str
    key: GraphKey | None = None
    rows: int = 0
    tokens: int = 0
    base_rows: int | None = None
    """Pool rows in the base product; 0: a kernel of its own; None: no adapter in the step."""


@dataclass(frozen=True)
class Seen:
    """The logits [V] that a sequence's token at position `position` was chosen from."""

    sequence: int
    position: int
    logits: torch.Tensor
    replayed: bool


class Fixed:
    """Costs that always favour one way to shrink."""

    def __init__(self, product: float, kernel: float):
        self.product, self.kernel = product, kernel

    def in_product(self, tokens: int, rows: int) -> float:
        return self.product

    def in_kernel(self, tokens: int, rows: int) -> float:
        return self.kernel


WAYS = {"product": Fixed(1, 2), "kernel": Fixed(2, 1)}


class SeenRunner(gpu_runner.GpuRunner):
    """Writes down every step and every row's logits."""

    def __init__(self, *args: Any):
        self.events: list[Event] = []
        self.seen: list[Seen] = []
        super().__init__(*args)

    def shrink(self, way: str) -> None:
        """From now on, shrink in this way wherever it is possible."""
        assert self._chooser is not None
        self._chooser._costs = WAYS[way]

    def load(self, load: AdapterLoad, weights: Any) -> None:
        super().load(load, weights)
        self.events.append(Event("load"))

    def _replay(
        self, rows: Sequence[Row], key: GraphKey, captured: Captured, choice: LoRAChoice | None
    ) -> StepOutput:
        assert self._graphs is not None and self._graphs.get(key) is captured
        base_rows = None if choice is None else choice.base_rows
        sequences = len({row.sequence_id for row in rows})
        self.events.append(Event("replay", key, sequences, len(rows), base_rows))
        return super()._replay(rows, key, captured, choice)

    def _run_eagerly(
        self, rows: Sequence[Row], choice: LoRAChoice | None, *, store: bool = True
    ) -> StepOutput:
        if store:
            tokens = sum(len(row.token_ids) for row in rows)
            base_rows = None if choice is None else choice.base_rows
            self.events.append(Event("eager", None, len(rows), tokens, base_rows))
        return super()._run_eagerly(rows, choice, store=store)

    def _choose_tokens(self, rows: Sequence[Row], output: StepOutput) -> gpu_runner.GpuRunning:
        replayed = self._last_step().kind == "replay"
        sampling = [row for row in rows if row.sample is not None]
        # A copy on the device: waiting for it here would hide what happens out of order.
        logits = output.logits.clone()  # [B, V]
        assert len(logits) == len(sampling)
        for row, values in zip(sampling, logits, strict=True):
            last = row.start + len(row.token_ids) - 1
            self.seen.append(Seen(row.sequence_id, last + 1, values, replayed))
        return super()._choose_tokens(rows, output)

    def _last_step(self) -> Event:
        return next(event for event in reversed(self.events) if event.kind != "load")


class Again:
    """In a graph's place: runs the step once more into the outputs of the first time."""

    def __init__(self, forward: Callable[[], StepOutput], output: StepOutput):
        self._forward, self._output = forward, output

    @torch.inference_mode()
    def replay(self) -> None:
        output = self._forward()
        for name in ("logits", "greedy", "ids"):
            getattr(self._output, name).copy_(getattr(output, name))

    def reset(self) -> None: ...


class CpuGraphs(StepGraphs):
    """Graphs that need no GPU."""

    @torch.inference_mode()
    def capture(self, key: GraphKey) -> Captured:
        self._prepare(key)
        output = self._forward(key)
        again: Any = Again(lambda: self._forward(key), output)
        captured = self._graphs[key] = Captured(again, output)
        return captured


class CpuReplayingRunner(SeenRunner):
    """The same on a CPU."""

    def _capture(self) -> StepGraphs | None:
        if self.config.enforce_eager:
            return None
        sizes = captured_sizes(self.config)
        graphs = CpuGraphs(sizes, self._prepare_capture, self._forward_captured)
        graphs.capture_all(self._graph_keys(sizes))
        return graphs

    def _attention_batch(
        self, packed: Any, count: int, max_queries: int, lists: Any, widest: int
    ) -> AttentionBatch:
        """The CPU's kernels read the lists, where a GPU's read what stands on the device."""
        view, buffer = packed.view, packed.device
        starts = view(buffer, "query_starts")[: count + 1].tolist()
        contexts = view(buffer, "context_lens")[:count].tolist()
        return super()._attention_batch(packed, count, max_queries, (starts, contexts), widest)

    def _lora_step(self, packed: Any, chunks: int, *args: Any, **more: Any) -> LoRAStep:
        """A graph's launch is made for so many chunks: no step may have more."""
        step = super()._lora_step(packed, chunks, *args, **more)
        assert int(step.work.counts[1]) <= chunks, "more chunks than the graph was captured for"
        return step


def use_seen_runner(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Give engines that are made from now on the runner of this file."""
    runner = SeenRunner if device == "cuda" else CpuReplayingRunner
    monkeypatch.setattr(engine_module, "make_runner", runner)
