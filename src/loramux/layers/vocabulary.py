"""Vocabularies of adapters: own rows of the embedding and the head, added tokens, LoRA on both.

    ids ── embedding ── rows of the adapter's own in place of the base model's ── + LoRA ── body
    hidden ── head ── its own rows' logits into their columns ── + LoRA ── columns it lacks: -inf

A place has room for the rows of one adapter; it is the place that the adapter has in the pool, whole.
Hooks on the two modules do it, for steps in which a token has such an adapter; others pass through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loramux.layers.batch import StepBatch, VocabularyRun, VocabularyStep


@dataclass(frozen=True, slots=True)
class VocabularyPart:
    """What the adapter at a pool row changes: its place, the tokens of its vocabulary, whether it has
    rows of the embedding, how many of the head; and rank and scale of its LoRA on both (0: none)."""

    place: int
    size: int
    embeds: bool
    head_rows: int
    embedding_lora: tuple[int, float] = (0, 0.0)
    head_lora: tuple[int, float] = (0, 0.0)

    @property
    def replaces(self) -> bool:
        return self.embeds or self.head_rows > 0


NO_PART = VocabularyPart(0, 0, False, 0)
"""Of an adapter that changes no vocabulary."""


@dataclass(frozen=True, slots=True)
class VocabularyShape:
    """Sizes of the pool: tokens of the base model and their width, places, rows in each, and rank rows
    of LoRA (0: none is served)."""

    size: int
    width: int
    places: int
    rows: int
    lora_rows: int

    @property
    def most(self) -> int:
        """Tokens of the largest vocabulary: each that is added has a row of its own."""
        return self.size + self.rows


class VocabularyPool:
    """The tables; `parts` says what stands where, by first pool row."""

    def __init__(
        self,
        shape: VocabularyShape,
        dtype: torch.dtype,
        lora_dtype: torch.dtype,
        device: torch.device,
    ):
        places, rows, width = shape.places if shape.rows else 0, shape.rows, shape.width
        ranks, most = shape.lora_rows, shape.most if shape.lora_rows else 0
        self.shape = shape
        self.parts: dict[int, VocabularyPart] = {}
        self.embedding_rows = torch.zeros(places, rows, width, dtype=dtype, device=device)
        self.head_rows = torch.zeros(places, rows, width, dtype=dtype, device=device)
        known = (places, shape.most if places else 0)
        self.row_of = torch.full(known, -1, dtype=torch.int32, device=device)  # [P, most]
        self.head_ids = torch.zeros(places, rows, dtype=torch.int64, device=device)
        self.embedding_a = torch.zeros(most, ranks, dtype=lora_dtype, device=device)
        self.embedding_b = torch.zeros(ranks, width, dtype=lora_dtype, device=device)
        self.head_a = torch.zeros(ranks, width, dtype=lora_dtype, device=device)
        self.head_b = torch.zeros(ranks, most, dtype=lora_dtype, device=device)

    # --- a step --------------------------------------------------------------------------------

    def embed(
        self, ids: torch.Tensor, x: torch.Tensor, step: VocabularyStep, scale: torch.Tensor | None
    ) -> None:
        """Change the embeddings x [T, D] of tokens ids [T] as the step's adapters do. `scale` is what
        the model's embedding multiplies its rows by."""
        for run in step.runs:
            here, y = ids[run.tokens], x[run.tokens]  # [n], [n, D]
            for part in self._parts_of(run):
                if part.embeds:
                    row = self.row_of[part.place][here]  # [n]
                    own = self.embedding_rows[part.place][row.clamp(min=0)]  # [n, D]
                    own = own if scale is None else own * scale.to(own.dtype)
                    y = torch.where((row >= 0).unsqueeze(-1), own, y)  # [n, D]
            total = y.float()  # [n, D]
            for first, factor in run.members:
                r, own_scale = self.parts.get(first, NO_PART).embedding_lora
                if not r:
                    continue
                h = self.embedding_a.narrow(1, first, r)[here].float()  # [n, r]
                delta = (h @ self.embedding_b[first : first + r].float()) * (own_scale * factor)
                total = total + (delta if scale is None else delta * scale.float())  # [n, D]
            x[run.tokens] = total.to(x.dtype)

    def project(self, x: torch.Tensor, y: torch.Tensor, step: VocabularyStep) -> torch.Tensor:
        """Hidden states x [B, D] and the base model's logits y [B, V] -> those of the step's adapters
        [B, step.size]; columns that a row's vocabulary lacks hold anything that is finite."""
        if step.size > y.shape[1]:
            y = nn.functional.pad(y, (0, step.size - y.shape[1]))  # [B, size]
        for run in step.runs:
            if run.kept.start == run.kept.stop:
                continue
            h, logits = x[run.kept], y[run.kept]  # [m, D], [m, size]
            for part in self._parts_of(run):
                if count := part.head_rows:
                    own = h @ self.head_rows[part.place, :count].t()  # [m, n]
                    logits.index_copy_(1, self.head_ids[part.place, :count], own.to(y.dtype))
            for first, factor in run.members:
                r, own_scale = self.parts.get(first, NO_PART).head_lora
                if not r:
                    continue
                ranks = slice(first, first + r)
                s = h.float() @ self.head_a[ranks].float().t()  # [m, r]
                delta = (s * (own_scale * factor)) @ self.head_b[ranks, : step.size].float()
                logits.copy_(logits.float() + delta)  # [m, size]
        return y

    def mask(self, logits: torch.Tensor, step: VocabularyStep) -> None:
        """Make columns of logits [B, step.size] that are in no row's vocabulary -inf."""
        for rows, size in self._sizes(step, len(logits)):
            if size < step.size:
                logits[rows, size:] = -torch.inf

    def _sizes(self, step: VocabularyStep, count: int) -> Iterator[tuple[slice, int]]:
        """Rows of the logits, and how many tokens their vocabulary has."""
        end = 0
        for run in step.runs:
            yield slice(end, run.kept.start), self.shape.size
            yield run.kept, run.size
            end = run.kept.stop
        yield slice(end, count), self.shape.size

    def _parts_of(self, run: VocabularyRun) -> Iterator[VocabularyPart]:
        found = (self.parts.get(first) for first, _ in run.members)
        return (part for part in found if part is not None and part.replaces)


class VocabularyHooks:
    """Lets a model's own embedding and head go through the pool, in steps whose batch says so."""

    def __init__(
        self, pool: VocabularyPool, batch: StepBatch, embedding: nn.Module, head: nn.Module
    ):
        self._pool = pool
        self._batch = batch
        self._ids: torch.Tensor | None = None
        table = getattr(embedding, "inner", embedding)
        self._scale = _embed_scale(table)
        embedding.register_forward_pre_hook(self._before)
        embedding.register_forward_hook(self._embedded)
        head.register_forward_hook(self._projected)

    def _before(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The base model's table ends before tokens that were added."""
        if self._batch.vocabulary is None:
            return None
        self._ids = inputs[0]  # [..., T]
        return (inputs[0].clamp(max=self._pool.shape.size - 1), *inputs[1:])

    def _embedded(self, _: nn.Module, inputs: object, x: torch.Tensor) -> torch.Tensor | None:
        step, ids = self._batch.vocabulary, self._ids
        if step is None or ids is None:
            return None
        self._ids = None
        self._pool.embed(ids.reshape(-1), x.view(-1, x.shape[-1]), step, self._scale)
        return x

    def _projected(
        self, _: nn.Module, inputs: tuple[Any, ...], y: torch.Tensor
    ) -> torch.Tensor | None:
        if (step := self._batch.vocabulary) is None:
            return None
        x = inputs[0]  # [..., B, D]
        logits = self._pool.project(
            x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), step
        )  # [B, size]
        return logits.view(*y.shape[:-1], logits.shape[-1])  # [..., B, size]


def _embed_scale(table: nn.Module) -> torch.Tensor | None:
    """What an embedding multiplies its rows by, as PEFT finds it."""
    scale = getattr(table, "embed_scale", None)
    if scale is None:
        return None
    weight = table.weight
    assert isinstance(weight, torch.Tensor)
    return torch.as_tensor(scale, device=weight.device, dtype=weight.dtype)
