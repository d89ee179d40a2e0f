"""The runner for CPUs: a step is done when its launch returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from loramux.adapters.weights import AdapterWeights
from loramux.config import EngineConfig, ModelFacts
from loramux.engine.cpu_work import lora_step
from loramux.engine.encoder_step import StepMedia
from loramux.engine.hidden import pooling
from loramux.engine.plan import (
    PENDING,
    AdapterLoad,
    Row,
    Sampled,
    SampleSpec,
    StepPlan,
    StepResult,
)
from loramux.engine.runner import Finished, Runner
from loramux.engine.sampler import sample
from loramux.kernels import AttentionBatch, Segments
from loramux.models.attach import Attached


class CpuRunner(Runner):
    """Weights in the order that the CPU's matrix products like best, steps in the caller's thread."""

    def __init__(self, attached: Attached, config: EngineConfig, facts: ModelFacts):
        super().__init__(attached, config, facts)
        self._chosen: dict[int, int] = {}  # of the step before, sequence -> token
        self._rank_rows: dict[int, int] = {}  # first pool row -> rank rows
        self._encoder = self._make_encoder(self._rank_rows)
        self._pack()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Finished:
        not_encoded = self._encoder.run(plan) if self._encoder else {}
        media = self._encoder.media(plan.rows, self._device) if self._encoder else None
        self._fill_batch(plan, media)
        try:
            with pooling(self.attached, plan.rows, plan.pooled) as pooled:
                logits = self._masked(self._forward(plan.rows, media))  # [B, V]
        finally:
            self.attached.batch.clear()
        rows = [row for row in plan.rows if row.sample is not None]
        chosen = self._choose(rows, logits)
        result = {row.sequence_id: s for row, s in zip(rows, chosen, strict=True)}
        self._chosen = {sequence: s.token_id for sequence, s in result.items()}
        return Finished(StepResult(result, pooled.read(), not_encoded))

    def load(self, load: AdapterLoad, weights: AdapterWeights) -> None:
        self._rank_rows[load.first_row] = load.ref.max_r
        super().load(load, weights)

    def _choose(self, rows: Sequence[Row], logits: torch.Tensor) -> list[Sampled]:
        """A token for each row of `logits` [B, V]: rank 0 chooses, the others are told."""
        if self.group.rank == 0:
            specs = [self._known(row.sequence_id, row.sample) for row in rows if row.sample]
            chosen = sample(logits, specs)
        else:
            chosen = [Sampled(0)] * len(rows)
        tokens = self._tensor([one.token_id for one in chosen])  # [B]
        self.group.broadcast(tokens)
        return chosen if self.group.rank == 0 else [Sampled(token) for token in tokens.tolist()]

    def _known(self, sequence: int, spec: SampleSpec) -> SampleSpec:
        """The spec with its pending token among the others."""
        if not spec.pending:
            return spec
        output = (*spec.output_ids, self._chosen[sequence]) if _counts_tokens(spec) else ()
        return spec._replace(output_ids=output, pending=False)

    def _pack(self) -> None:
        """Reorder every weight for the CPU's matrix products, one after the other."""
        seen = {id(merged): merged for merged, _ in self.attached.names.values()}
        for merged in seen.values():
            merged.pack()
        for module in self.attached.model.modules():
            if isinstance(module, torch.nn.Embedding):
                # The last that points into the mapped checkpoint, whose pages count as ours.
                module.weight.data = module.weight.data.clone()

    def _fill_batch(self, plan: StepPlan, media: StepMedia | None = None) -> None:
        batch = self.attached.batch
        batch.vocabulary = self._vocabulary_step(plan.rows)
        batch.slots = self._slots(plan.rows)  # [T]
        batch.attention = self._attention(plan.rows)
        if media is not None and media.last_keys is not None:
            batch.attention = dataclasses.replace(batch.attention, last_keys=media.last_keys)
        if self._deal > 1:
            batch.lora = lora_step(plan.rows, self._rank_rows, self._affine_rows, self._deal)
        else:
            batch.segments = self._segments(plan.rows)

    def _forward(self, rows: Sequence[Row], media: StepMedia | None = None) -> torch.Tensor:
        """Logits [B, V] of the last token of each row that samples."""
        ids: list[int] = []
        for row in rows:
            ids += row.token_ids
            if ids[-1] == PENDING:
                ids[-1] = self._chosen[row.sequence_id]
        places = [row.start + row.shift for row in rows]
        positions = self._tensor(
            [
                p
                for row, at in zip(rows, places, strict=True)
                for p in range(at, at + len(row.token_ids))
            ]
        )  # [T]
        overlay = None
        if media is not None:
            overlay, placed = media.overlay, self._place(media)
            positions = positions if placed is None else placed  # [T] or [3, T]
        keep, end = [], 0
        for row in rows:
            end += len(row.token_ids)
            if row.sample is not None:
                keep.append(end - 1)
        if self.decoder is not None:
            self.attached.batch.positions = positions.int()  # [T]
            return self.decoder.forward(
                self._tensor(ids), self._tensor(keep), overlay=overlay
            )  # [B, V]
        return self.attached.own_forward(
            *(self._tensor(ids), positions, self._tensor(keep), overlay)
        )  # [B, V]

    def _tensor(self, values: Sequence[object], dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)

    def _slots(self, rows: Sequence[Row]) -> torch.Tensor:
        size = self.block_size
        return self._tensor(
            [
                row.block_table[p // size] * size + p % size
                for row in rows
                for p in range(row.start, row.start + len(row.token_ids))
            ]
        )  # [T]

    def _attention(self, rows: Sequence[Row]) -> AttentionBatch:
        width = max(len(row.block_table) for row in rows)
        tables = [row.block_table + (0,) * (width - len(row.block_table)) for row in rows]
        starts, contexts = [0], []
        for row in rows:
            starts.append(starts[-1] + len(row.token_ids))
            contexts.append(row.start + len(row.token_ids))
        return AttentionBatch(
            block_tables=self._tensor(tables, torch.int32),  # [Q, blocks]
            query_starts=starts,
            query_starts_tensor=self._tensor(starts, torch.int32),  # [Q+1]
            context_lens=contexts,
            context_lens_tensor=self._tensor(contexts, torch.int32),  # [Q]
        )

    def _segments(self, rows: Sequence[Row]) -> Segments | None:
        """Runs of tokens with equal members; None when no row has an adapter."""
        runs: list[tuple[int, int, tuple[tuple[int, float], ...]]] = []
        token = 0
        for count, members in (part for row in rows for part in row.parts()):
            end = token + count
            if members:
                if runs and runs[-1][1] == token and runs[-1][2] == members:
                    runs[-1] = (runs[-1][0], end, members)
                else:
                    runs.append((token, end, members))
            token = end
        if not runs:
            return None
        offsets = [0]
        for _, _, members in runs:
            offsets.append(offsets[-1] + len(members))
        flat = [member for _, _, members in runs for member in members]
        return Segments(
            starts=self._tensor([run[0] for run in runs], torch.int32),  # [G]
            ends=self._tensor([run[1] for run in runs], torch.int32),  # [G]
            member_offsets=self._tensor(offsets, torch.int32),  # [G+1]
            member_rows=self._tensor([row for row, _ in flat], torch.int32),  # [M]
            member_scales=self._tensor([scale for _, scale in flat], torch.float32),  # [M]
            num_segments=len(runs),
            affine_rows=frozenset(row for row, _ in flat if row in self._affine_rows),
        )


def _counts_tokens(spec: SampleSpec) -> bool:
    """Whether a penalty looks at the tokens so far."""
    params = spec.params
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )
