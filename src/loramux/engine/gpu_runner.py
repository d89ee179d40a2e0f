"""The runner for GPUs: packed steps, captured graphs, results read a step later.

    fill a host buffer ── plan attention ── one copy ── replay or run ── choose tokens ── copy back
          (host)             (host)          └────────────── one stream, nobody waits ─────────┘

It runs on any device without graphs, which is how it is tested without a GPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from loramux.adapters.weights import AdapterWeights
from loramux.config import EngineConfig, ModelFacts
from loramux.config.graphs import affine_buckets
from loramux.config.memory import captured_sizes, pool_rank
from loramux.engine.attention_plans import attention_batch, make_planner
from loramux.engine.choosers import make_chooser, side_stream
from loramux.engine.gpu_running import GpuRunning, event_behind_all
from loramux.engine.graphs import Captured, GraphKey, StepGraphs, StepOutput, graph_keys
from loramux.engine.hidden import pooling
from loramux.engine.logits import SharedLogits, likeliest
from loramux.engine.lora_choice import LoRAChoice
from loramux.engine.outer_steps import OuterSteps
from loramux.engine.packing import (
    PackedStep,
    Run,
    StepShape,
    active_runs,
    capacities,
    chunk_rows,
    decodes_first,
    fill,
    have_members,
    leading_decodes,
    runs_of,
)
from loramux.engine.plan import AdapterLoad, Row, StepPlan
from loramux.engine.reading import Reading, places_of
from loramux.engine.runner import Runner
from loramux.engine.sampler import Sampler
from loramux.engine.singles import Limits, single_tokens
from loramux.engine.trial import failing_sizes, trial_rows
from loramux.engine.warm_up import StepLimits, places, warm_up, warm_up_adapters, whole_row
from loramux.kernels import AttentionBatch, take_tokens
from loramux.layers.batch import LoRAStep, Overlay, VocabularyStep
from loramux.layers.sharded import deal_out, parted
from loramux.models.attach import Attached

logger = logging.getLogger(__name__)


class GpuRunner(Runner):
    """`launch` only queues work; the thread that calls it never waits for the device."""

    extends_products = True

    def __init__(self, attached: Attached, config: EngineConfig, facts: ModelFacts):
        super().__init__(attached, config, facts)
        self.config = config
        self._on_gpu = self._device.type == "cuda"
        self.reading = Reading() if self._on_gpu else None
        self._sampler = Sampler(self._device)
        self._ranks: dict[int, int] = {}  # first pool row -> rank rows
        self._encoder = self._make_encoder(self._ranks)
        self._previous: dict[int, int] = {}  # sequence -> place of its token in `_chosen`
        self._lora_stream = side_stream(config.lora, self._device)
        self._graph_width = -(-pool_rank(config.lora, self._deal) // 16) * 16 if config.lora else 0
        self._logits_place: SharedLogits | None = None
        needs = self._plan.needs
        with self._taking("workspace", needs.workspace):
            self._make_buffers()
            self._planner = make_planner(
                *(attached.attentions, self._decode, self._mixed),
                *(self.block_size, attached.model.dtype),
            )
            self._active, self._chooser = make_chooser(
                *(attached, config.lora, facts, self._device), measure=self._on_gpu
            )
        with self._taking("graphs", needs.graphs):
            self._graphs = self._capture()
            sizes = self._graphs.sizes if self._graphs else []
            self._limits = Limits.of(sizes, config.max_num_seqs, facts.kv_bytes_per_token)
        if self._on_gpu:
            with self._taking("activations", needs.activations):
                self.warm_up()
                self.try_prompts()

    # --- a step --------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> GpuRunning:
        """Queue one step. Raises what a launch raises; what the device finds out, `read` raises."""
        not_encoded = self._encoder.run(plan) if self._encoder else {}
        rows: Sequence[Row] = plan.rows
        runs = runs_of(rows)
        choice = self._choose_lora(runs, plan.num_tokens)
        singles = single_tokens(rows, self.block_size, self._limits)
        captured = None
        if singles is not None and not plan.pooled:
            captured = self._find_graph(singles, runs, choice)
        if singles is not None and captured is not None:
            return self._choose_tokens(rows, self._replay(singles, *captured, choice))
        rows = decodes_first(rows)
        with pooling(self.attached, rows, plan.pooled) as pooled:
            output = self._run_eagerly(rows, choice)
        running = self._choose_tokens(rows, output)
        running.pooled, running.not_encoded = pooled, not_encoded
        return running

    @torch.inference_mode()
    def load(self, load: AdapterLoad, weights: AdapterWeights) -> None:
        self._ranks[load.first_row] = self._rows_of(load)
        super().load(load, weights)

    def close(self) -> None:
        if self._graphs is not None:
            self._graphs.clear()

    def _choose_tokens(self, rows: Sequence[Row], output: StepOutput) -> GpuRunning:
        kept = [row for row in rows if row.sample is not None]
        specs = [row.sample for row in kept if row.sample is not None]
        choice = None
        if self.group.rank == 0:
            choice = self._sampler.choose(output.logits, specs, output.ids, output.greedy)
            self._chosen[: len(kept)] = choice.tokens
        self.group.broadcast(self._chosen[: len(kept)])
        self._previous = {row.sequence_id: place for place, row in enumerate(kept)}
        if self.reading is not None:
            self.reading.launched(event_behind_all(), places_of(rows, self._ranks))
        return GpuRunning(kept, choice)

    def _choose_lora(self, runs: Sequence[Run], tokens: int) -> LoRAChoice | None:
        if self._chooser is None or not any(run.members for run in runs):
            return None
        buckets = None
        if have_members(runs, self._affine_rows):
            size = (self._graphs and self._graphs.size_for(tokens)) or tokens
            buckets = affine_buckets(self._chooser.buckets, size, self.config.max_num_seqs)
        return self._chooser.choose(runs, self._ranks, tokens, buckets)

    def _fill(
        self,
        packed: PackedStep,
        rows: Sequence[Row],
        choice: LoRAChoice | None,
        rows_per_chunk: int,
        pad_to: int = 0,
        decodes: int = 0,
    ) -> tuple[torch.Tensor, StepShape]:
        host = packed.next_host()
        shape = fill(
            *(packed, host, rows, self.block_size),
            previous=self._previous,
            columns=choice.columns if choice else {},
            ranks=self._ranks,
            affine_rows=self._affine_rows,
            rows_per_chunk=rows_per_chunk,
            pad_to=pad_to,
            decodes=decodes,
        )
        return host, shape

    # --- captured steps ------------------------------------------------------------------------

    def _find_graph(
        self, rows: Sequence[Row], runs: Sequence[Run], choice: LoRAChoice | None
    ) -> tuple[GraphKey, Captured] | None:
        graphs = self._graphs
        if graphs is None:
            return None
        size = graphs.size_for(len(rows))
        if size is None or not self._decode.fits(rows):
            return None
        if choice is None:
            key = GraphKey(size)
        elif not choice.base_rows and choice.width > self._graph_width:
            return None  # a sum of many adapters: wider than what was captured
        else:
            outer = self._vocabulary_step(rows) is not None
            affine = outer or have_members(runs, self._affine_rows)
            bound = 0 if affine else self._active_bucket(active_runs(runs), size)
            key = GraphKey(size, True, choice.base_rows, bound, affine=affine, outer=outer)
        key = key.keeping(self.config.max_num_seqs)
        captured = graphs.get(key)
        return None if captured is None else (key, captured)

    def _active_bucket(self, active: int, size: int) -> int:
        """0: any number, which is all that is captured without `specialize_active_lora`."""
        return next((bucket for bucket in self._active if active <= bucket <= size), 0)

    def _replay(
        self, rows: Sequence[Row], key: GraphKey, captured: Captured, choice: LoRAChoice | None
    ) -> StepOutput:
        packed = self._decode
        host, shape = self._fill(packed, rows, choice, chunk_rows(key.tokens), pad_to=key.tokens)
        self._plan_decode(packed, host, key.tokens)
        packed.send(host, shape.words)
        vocabulary, outer = None, self._outer if key.outer else None
        if outer is not None:
            vocabulary = outer.begin(self._vocabulary_step(rows), self._ids(packed, len(rows)))
        captured.graph.replay()
        count = sum(row.sample is not None for row in rows)
        kept: slice | torch.Tensor = slice(count)
        if count < len(rows) and key.kept is None:
            kept = packed.view(packed.device, "keep")[:count].long()
        output = captured.output.take(kept)
        return output if outer is None else outer.finish(output, vocabulary, self._chosen)

    def _plan_decode(self, packed: PackedStep, host: torch.Tensor, count: int) -> None:
        if self._planner is not None:
            starts = packed.view(host, "page_starts")[: count + 1]
            lasts = packed.view(host, "last_page_lens")[:count]
            self._planner.plan_decode(count, starts, lasts, graph=True)

    def _prepare_capture(self, key: GraphKey) -> None:
        """An empty step of the key's size: padding only."""
        host, shape = self._fill(self._decode, (), None, chunk_rows(key.tokens), pad_to=key.tokens)
        self._plan_decode(self._decode, host, key.tokens)
        self._decode.send(host, shape.words)

    def _forward_captured(self, key: GraphKey) -> StepOutput:
        count, packed = key.tokens, self._decode
        lora = None
        if key.adapters:
            step = chunk_rows(count)
            bound = count if not key.active else min(count, count // step + key.active + 1)
            lora = self._lora_step(
                *(packed, bound, step, key.base_rows, self._graph_width), affine=key.affine
            )
        lists = (list(range(count + 1)), [1] * count)
        blocks = self._blocks_per_sequence
        attention = attention_batch(packed, self._planner, count, 1, lists, blocks)
        if key.outer:
            return self._forward(packed, count, key.kept, attention, lora, outer=True)
        out = self._shared_logits(count if key.kept is None else key.kept)
        return self._forward(packed, count, key.kept, attention, lora, out)

    def _shared_logits(self, count: int) -> torch.Tensor | None:
        if self.decoder is None:
            return None
        if self._logits_place is None:  # once: graphs hold its address
            most, dtype = self.config.max_num_seqs, self.attached.model.dtype
            self._logits_place = SharedLogits.of(self.decoder.head, most, dtype, self._device)
        return self._logits_place.first(count)  # [count, V]

    def _capture(self) -> StepGraphs | None:
        if not self._on_gpu or self.config.enforce_eager:
            return None
        sizes = captured_sizes(self.config)
        graphs = StepGraphs(sizes, self._prepare_capture, self._forward_captured)
        start = time.perf_counter()
        graphs.capture_all(self._graph_keys(sizes), alone=self.group.size == 1)
        logger.info("captured %d steps in %.1f s", len(graphs), time.perf_counter() - start)
        return graphs

    def _graph_keys(self, sizes: Sequence[int]) -> list[GraphKey]:
        places = [] if self._chooser is None else [0, *self._chooser.buckets]
        most, outer = self.config.max_num_seqs, self._outer is not None
        keys = graph_keys(sizes, places, self._active, sequences=most, outer=outer)
        return [key.keeping(most) for key in keys]

    # --- other steps ---------------------------------------------------------------------------

    def _run_eagerly(
        self, rows: Sequence[Row], choice: LoRAChoice | None, *, store: bool = True
    ) -> StepOutput:
        """`rows` as `decodes_first` has them. Without `store` nothing goes into the KV cache."""
        packed = self._mixed
        tokens = sum(len(row.token_ids) for row in rows)
        rows_per_chunk = chunk_rows(tokens)
        decodes = leading_decodes(rows)
        host, shape = self._fill(packed, rows, choice, rows_per_chunk, decodes=decodes)
        if not store:
            packed.view(host, "slots")[:tokens] = -1
        media = self._encoder.media(rows, self._device) if self._encoder else None
        placed = None if media is None else self._place(media)
        if placed is not None and placed.dim() == 1:
            packed.view(host, "positions")[:tokens] = placed
        count = shape.sequences
        starts = packed.view(host, "query_starts")[: count + 1]
        contexts = packed.view(host, "context_lens")[:count]
        pages = packed.view(host, "page_starts")[: count + 1]
        whole = None if media is None else media.last_keys
        planner = self._planner if whole is None else None  # FlashInfer knows no such mask
        if planner is not None:
            lasts = packed.view(host, "last_page_lens")[:count]
            planner.plan_prefill(starts, pages, lasts, tokens, decodes)
        widest = int((pages[1:] - pages[:-1]).max())
        lists = (starts.tolist(), contexts.tolist())
        packed.send(host, shape.words)
        lora = None
        if choice is not None:
            runs = runs_of(rows)
            lora = self._lora_step(
                *(packed, shape.chunks, rows_per_chunk, choice.base_rows, choice.width),
                members=sum(len(run.members) for run in runs),
                affine=have_members(runs, self._affine_rows),
            )
        attention = attention_batch(packed, planner, count, shape.max_queries, lists, widest)
        if whole is not None:
            attention = replace(attention, last_keys=whole)
        overlay = None if media is None else media.overlay
        return self._forward(
            *(packed, tokens, shape.kept, attention, lora),
            overlay=overlay,
            placed=placed,
            vocabulary=self._vocabulary_step(rows),
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run steps of every kind; what is in the KV cache and in the pool stays as it is."""
        buckets = () if self._chooser is None else self._chooser.buckets
        run = partial(self._run_eagerly, store=False)
        known, self._ranks = self._ranks, {} if self._chooser is None else places(self.config)
        try:
            warm_up(run, self._sampler, StepLimits.of(self.config), self._ranks, buckets)
            self._affine_rows.update(self._ranks)
            warm_up_adapters(run, StepLimits.of(self.config), self._ranks, buckets)
            if self._encoder is not None and self._encoder.sees_whole:
                run([whole_row(self.block_size)], None)
        finally:
            self._ranks = known
            self._affine_rows.clear()

    @torch.inference_mode()
    def try_prompts(self) -> None:
        """Before any request: captured steps with prompts must do what launching does, or none is used.

        Writes to blocks that nobody has yet."""
        rows, most, graphs = trial_rows(self.block_size), self.config.max_num_seqs, self._graphs
        fits = rows[-1].block_table[-1] < self.num_blocks and self._mixed.fits(rows)
        if graphs is None or len(rows) > most or not fits:
            return
        launch = partial(self._run_eagerly, choice=None)
        failing = failing_sizes(graphs, rows, self.block_size, launch, self._replay, most)
        if failing := self.group.share(failing, self._device):
            logger.warning("graphs of %s tokens compute prompts wrong: they are launched", failing)
            graphs.sizes = [size for size in graphs.sizes if size <= most]
            self._limits = Limits(max(graphs.sizes, default=0), 0, self._limits.cut)

    # --- both ----------------------------------------------------------------------------------

    def _forward(
        self,
        packed: PackedStep,
        tokens: int,
        kept: int | None,
        attention: AttentionBatch,
        lora: LoRAStep | None,
        out: torch.Tensor | None = None,
        overlay: Overlay | None = None,
        placed: torch.Tensor | None = None,
        vocabulary: VocabularyStep | None = None,
        *,
        outer: bool = False,
    ) -> StepOutput:
        """Run on the packed buffer's contents; `kept` None keeps every row. `placed` [3, T]: positions
        in place of the buffer's, for the model's own forward. With `outer` only the body runs."""
        view, batch = packed.view, self.attached.batch
        buffer = packed.device
        ids = self._ids(packed, tokens)  # [T]
        batch.vocabulary = vocabulary
        batch.slots = view(buffer, "slots")[:tokens]  # [T]
        batch.positions = view(buffer, "positions")[:tokens]  # [T]
        batch.attention, batch.lora = attention, lora
        keep = None if kept is None else view(buffer, "keep")[:kept]  # [B]
        try:
            if outer and self._outer is not None:
                return self._outer.body(ids, keep)
            if self.decoder is not None:
                logits = self.decoder.forward(ids, keep, out, overlay)  # [B, V]
            else:
                where = batch.positions if placed is None else placed.to(self._device)
                logits = self.attached.own_forward(ids, where, keep, overlay)  # [B, V]
            logits = self._masked(logits)  # [B, V]
        finally:
            batch.clear()
        greedy = likeliest(logits)  # [B]
        self._chosen[: greedy.shape[0]] = greedy
        return StepOutput(logits, greedy, ids if keep is None else ids[keep])

    def _ids(self, packed: PackedStep, tokens: int) -> torch.Tensor:
        """The tokens [T] of a step, those that the step before chose among them."""
        ids, sources = (packed.view(packed.device, name)[:tokens] for name in ("ids", "sources"))
        return take_tokens(ids, sources, self._chosen)  # [T]

    def _lora_step(
        self,
        packed: PackedStep,
        chunks: int,
        rows_per_chunk: int,
        base_rows: int,
        width: int,
        members: int | None = None,
        *,
        affine: bool,
    ) -> LoRAStep:
        """`members`: how many the step has, where that is known; experts' work depends on it."""
        work = packed.work(chunks, rows_per_chunk, members, affine=affine)
        parts = (deal_out(work, self._deal), *parted(work)) if self._deal > 1 else ()
        return LoRAStep(work, base_rows, width, self._lora_stream, *parts)

    # --- making --------------------------------------------------------------------------------

    def _make_buffers(self) -> None:
        config, largest = self.config, max(captured_sizes(self.config))
        self._blocks_per_sequence, decode, mixed = capacities(config, largest, self.block_size)
        self._decode = PackedStep(decode, self._device)
        self._mixed = PackedStep(mixed, self._device)
        sequences = config.max_num_seqs
        self._chosen = torch.zeros(max(largest, sequences), dtype=torch.int64, device=self._device)
        self._outer = OuterSteps.of(self.attached, self._vocabularies, config, largest)
