"""Captured steps of adapters that change the vocabulary: only the body is replayed.

    ids ── embedding, with their rows ──▶ [ graph: layers ] ──▶ head, with their rows ── logits
            launched                       replayed               launched

What is launched depends on the step's adapters, and is little beside the layers.
"""

from __future__ import annotations

import torch

from loramux.config import EngineConfig
from loramux.engine.graphs import StepOutput
from loramux.engine.logits import likeliest
from loramux.engine.vocabulary import Vocabularies
from loramux.layers.batch import StepBatch, VocabularyStep
from loramux.models.attach import Attached
from loramux.models.layers import FusedDecoder


class OuterSteps:
    """What such steps share: places for embeddings and hidden states, whose addresses graphs hold."""

    def __init__(
        self,
        decoder: FusedDecoder,
        batch: StepBatch,
        vocabularies: Vocabularies,
        tokens: int,
        sequences: int,
    ):
        """For steps of up to `tokens` tokens that keep up to `sequences` rows."""
        embeddings = vocabularies.pool.embedding_rows
        width = vocabularies.pool.shape.width
        self._decoder = decoder
        self._batch = batch
        self._vocabularies = vocabularies
        self._embeddings = embeddings.new_zeros(tokens, width)  # [T, D]
        self._hidden = embeddings.new_zeros(max(tokens, sequences), width)  # [B, D]

    @classmethod
    def of(
        cls,
        attached: Attached,
        vocabularies: Vocabularies | None,
        config: EngineConfig,
        tokens: int,
    ) -> OuterSteps | None:
        """None where there are no such steps: adapters change no vocabulary, or the model keeps its own
        forward, which has no body to be captured alone."""
        lora, decoder = config.lora, attached.decoder
        if vocabularies is None or decoder is None or lora is None or not lora.changes_vocabulary:
            return None
        return cls(decoder, attached.batch, vocabularies, tokens, config.max_num_seqs)

    def body(self, ids: torch.Tensor, keep: torch.Tensor | None) -> StepOutput:
        """What is captured, for ids [T]: hidden states [B, D] of rows `keep` [B], in place of logits."""
        x = self._decoder.body(self._embeddings[: len(ids)].clone())  # [T, D]
        place = self._hidden[: len(x if keep is None else keep)]  # [B, D]
        if keep is None:
            place.copy_(x)
        else:
            torch.index_select(x, 0, keep, out=place)
        kept = ids if keep is None else ids[keep]  # [B]
        return StepOutput(place, kept, kept)

    def begin(self, step: VocabularyStep | None, ids: torch.Tensor) -> VocabularyStep:
        """Make ready what a replay of `step` starts from: the embeddings of its tokens ids [T]."""
        assert step is not None, "a step that changes no vocabulary. This is a bug."
        self._batch.vocabulary = step
        try:
            self._embeddings[: len(ids)] = self._decoder.embedding(ids)  # [T, D]
        finally:
            self._batch.clear()
        return step

    def finish(
        self, body: StepOutput, step: VocabularyStep | None, chosen: torch.Tensor
    ) -> StepOutput:
        """Logits out of what a replay left, of the rows that sample; their likeliest into `chosen`."""
        assert step is not None, "a step that changes no vocabulary. This is a bug."
        self._batch.vocabulary = step
        try:
            logits = self._decoder.logits(body.logits)  # [B, V]
        finally:
            self._batch.clear()
        self._vocabularies.pool.mask(logits, step)
        greedy = likeliest(logits)  # [B]
        chosen[: len(greedy)] = greedy
        return StepOutput(logits, greedy, body.ids)
