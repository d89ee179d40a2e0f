"""The only door to the device: a frozen plan in, chosen tokens out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loramux.adapters.weights import AdapterWeights
from loramux.config import EngineConfig, ModelFacts, num_blocks
from loramux.engine.plan import AdapterLoad, Row, StepPlan, StepResult
from loramux.engine.sampler import sample
from loramux.kernels import AttentionBatch, Segments
from loramux.models.attach import Attached


class Runner:
    """Holds the model, the KV cache and the adapter pool; executes steps and loads adapters.

    `execute` belongs to the step loop's thread. `load` may run in another thread at the same time:
    it writes only rows that no step uses until the scheduler has been told.
    """

    def __init__(self, attached: Attached, config: EngineConfig, facts: ModelFacts):
        self.attached = attached
        self.num_blocks = num_blocks(config, facts)
        self.block_size = config.block_size
        self._device = attached.device
        dtype = getattr(torch, facts.dtype)
        for attention in attached.attentions:
            attention.allocate(self.num_blocks, config.block_size, dtype, facts.device)
        if config.lora is not None:
            rows = config.lora.max_loras * config.lora.max_lora_rank
            lora_dtype = getattr(torch, config.lora.lora_dtype)
            for site in attached.sites:
                site.attach_site(rows, lora_dtype)
        if self._device.type == "cpu":
            self._pack()

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. Keys and values of its tokens are in the cache when it returns."""
        self._fill_batch(plan)
        try:
            logits = self._forward(plan.rows)  # [B, V]
        finally:
            self.attached.batch.clear()
        rows = [row for row in plan.rows if row.sample is not None]
        chosen = sample(logits, [row.sample for row in rows if row.sample is not None])
        return StepResult({row.sequence_id: s for row, s in zip(rows, chosen, strict=True)})

    @torch.inference_mode()
    def load(self, load: AdapterLoad, weights: AdapterWeights) -> None:
        """Write an adapter into its rank rows."""
        rows = slice(load.first_row, load.first_row + load.ref.max_r)
        first = load.first_row
        for merged in self.attached.sites:
            assert merged.site is not None
            merged.site.row_r[:, rows] = 0
        for name, pair in weights.pairs.items():
            spec = self.attached.schema.modules[name]
            site = self.attached.sites[spec.site].site
            assert site is not None
            columns = slice(
                site.slice_starts[spec.slice_index], site.slice_starts[spec.slice_index + 1]
            )
            site.a[spec.slice_index, first : first + pair.r].copy_(pair.a)  # [r, in]
            site.b[first : first + pair.r, columns].copy_(pair.b)  # [r, out]
            site.row_scale[spec.slice_index, first] = pair.scale
            site.row_r[spec.slice_index, first] = pair.r
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _pack(self) -> None:
        """Reorder every weight for the CPU's matrix products, one after the other."""
        seen = {id(merged): merged for merged, _ in self.attached.names.values()}
        for merged in seen.values():
            merged.pack()
        for module in self.attached.model.modules():
            if isinstance(module, torch.nn.Embedding):
                # The last that points into the mapped checkpoint, whose pages count as ours.
                module.weight.data = module.weight.data.clone()

    def _fill_batch(self, plan: StepPlan) -> None:
        batch = self.attached.batch
        batch.slots = self._slots(plan.rows)  # [T]
        batch.attention = self._attention(plan.rows)
        batch.segments = self._segments(plan.rows)

    def _forward(self, rows: Sequence[Row]) -> torch.Tensor:
        """Logits [B, V] of the last token of each row that samples."""
        ids = [token for row in rows for token in row.token_ids]
        positions = [p for row in rows for p in range(row.start, row.start + len(row.token_ids))]
        keep, end = [], 0
        for row in rows:
            end += len(row.token_ids)
            if row.sample is not None:
                keep.append(end - 1)
        output = self.attached.model(
            input_ids=self._tensor([ids]),  # [1, T]
            position_ids=self._tensor([positions]),  # [1, T]
            use_cache=False,
            logits_to_keep=self._tensor(keep),  # [B]
        )
        logits: torch.Tensor = output.logits
        return logits[0]  # [B, V]

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
        for row in rows:
            end = token + len(row.token_ids)
            if row.members:
                if runs and runs[-1][1] == token and runs[-1][2] == row.members:
                    runs[-1] = (runs[-1][0], end, row.members)
                else:
                    runs.append((token, end, row.members))
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
        )
