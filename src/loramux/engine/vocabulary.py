"""Adapters' own vocabularies in a step, and on their way into the tables that steps read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loramux.adapters.vocabulary_rows import rows_of
from loramux.adapters.weights import AdapterWeights, StoredPair, StoredVocabulary
from loramux.config import EngineConfig
from loramux.config.memory import pool_rank, pool_rows
from loramux.engine.plan import AdapterLoad, Row
from loramux.layers.batch import VocabularyRun, VocabularyStep
from loramux.layers.vocabulary import (
    VocabularyHooks,
    VocabularyPart,
    VocabularyPool,
    VocabularyShape,
)
from loramux.models.attach import Attached


class Vocabularies:
    """The vocabularies of adapters on the device of one runner."""

    def __init__(self, pool: VocabularyPool, rows_a_place: int):
        self.pool = pool
        self._rows_a_place = rows_a_place

    @classmethod
    def of(cls, attached: Attached, config: EngineConfig) -> Vocabularies | None:
        """The tables as `config` has room for them; None where adapters change no vocabulary."""
        lora, spec = config.lora, attached.schema.vocabulary
        if lora is None or spec is None:
            return None
        granule = config.row_granule
        ranks = pool_rows(lora, granule) if lora.enable_vocabulary_lora else 0
        shape = VocabularyShape(
            *(spec.size, spec.width, lora.max_loras, lora.max_lora_vocabulary_rows, ranks)
        )
        model = attached.model
        lora_dtype = getattr(torch, lora.lora_dtype)
        pool = VocabularyPool(shape, model.dtype, lora_dtype, attached.device)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        VocabularyHooks(pool, attached.batch, embedding, head)
        return cls(pool, pool_rank(lora, granule))

    def step(self, rows: Sequence[Row]) -> VocabularyStep | None:
        """What of `rows`, in the order of the step, goes through the tables; None: nothing."""
        parts = self.pool.parts
        if not parts or not any(first in parts for row in rows for first, _ in row.members):
            return None
        runs: list[VocabularyRun] = []
        token = kept = 0
        for row in rows:
            stop, last = token + len(row.token_ids), kept + (row.sample is not None)
            if any(first in parts for first, _ in row.members):
                before = runs[-1] if runs else None
                if before and (before.tokens.stop, before.members) == (token, row.members):
                    runs.pop()
                    start, first_kept = before.tokens.start, before.kept.start
                else:
                    start, first_kept = token, kept
                runs.append(self._run(slice(start, stop), slice(first_kept, last), row.members))
            token, kept = stop, last
        size = max(self.pool.shape.size, *(run.size for run in runs))
        return VocabularyStep(tuple(runs), size)

    def _run(
        self, tokens: slice, kept: slice, members: tuple[tuple[int, float], ...]
    ) -> VocabularyRun:
        base = self.pool.shape.size
        found = [part for first, _ in members if (part := self.pool.parts.get(first)) is not None]
        # A composition has one vocabulary at most that is not the base model's.
        size = next((part.size for part in found if part.size != base), base)
        return VocabularyRun(tokens, kept, size, members)

    def forget(self, first_row: int) -> None:
        """An adapter is about to be written to the pool rows from `first_row` on."""
        self.pool.parts.pop(first_row, None)

    def write(self, load: AdapterLoad, weights: AdapterWeights) -> None:
        """Write the vocabulary of an adapter into its place; on a GPU, on the stream of this thread."""
        stored = weights.layout.vocabulary
        assert stored is not None, "an adapter without a vocabulary. This is a bug."
        first = load.first_row
        place = first // self._rows_a_place
        head_rows = self._write_rows(place, stored, weights.buffer)
        loras = [
            self._write_lora(first, stored, weights.buffer, pair, of_head=of_head)
            for pair, of_head in ((stored.embedding_lora, False), (stored.head_lora, True))
        ]
        self.pool.parts[first] = VocabularyPart(
            place, stored.size, bool(stored.embedding), head_rows, *loras
        )

    def _write_rows(self, place: int, stored: StoredVocabulary, buffer: torch.Tensor) -> int:
        """How many rows of the head there are."""
        pool = self.pool
        if stored.embedding:
            ids, rows = rows_of(stored.embedding, buffer, pool.embedding_rows.dtype)  # [n], [n, D]
            pool.embedding_rows[place, : len(ids)].copy_(rows)
            row_of = torch.full((pool.shape.most,), -1, dtype=torch.int32)  # [most]
            row_of[torch.from_numpy(ids)] = torch.arange(len(ids), dtype=torch.int32)
            pool.row_of[place].copy_(row_of)
        if not stored.head:
            return 0
        ids, rows = rows_of(stored.head, buffer, pool.head_rows.dtype)  # [n], [n, D]
        pool.head_rows[place, : len(ids)].copy_(rows)
        pool.head_ids[place, : len(ids)].copy_(torch.from_numpy(ids))
        return len(ids)

    def _write_lora(
        self,
        first: int,
        stored: StoredVocabulary,
        buffer: torch.Tensor,
        pair: StoredPair | None,
        *,
        of_head: bool,
    ) -> tuple[int, float]:
        """Rank and scale; columns of tokens that its vocabulary lacks become 0."""
        if pair is None:
            return 0, 0.0
        pool, size = self.pool, stored.size
        a, b = pair.a.view(buffer), pair.b.view(buffer)
        ranks = slice(first, first + pair.a.rows)
        if of_head:
            pool.head_a[ranks].copy_(a)  # [r, D]
            pool.head_b[ranks, :size].copy_(b.t())  # [r, size]
            pool.head_b[ranks, size:] = 0
        else:
            pool.embedding_a[:size, ranks].copy_(a.t())  # [size, r]
            pool.embedding_a[size:, ranks] = 0
            pool.embedding_b[ranks].copy_(b.t())  # [r, D]
        return pair.a.rows, pair.scale
