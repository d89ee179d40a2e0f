"""The parts of a standard pre-norm decoder, as fused ops over the model's own weights.

    x, residual ── qkv ── rope_kv ── attention ── o ── add_rms_norm ── gate_up ── gated ── down ──┐
        ▲                                                                                         │
        └───────────────────────── add_rms_norm, by the next layer's weight ──────────────────────┘

The LoRA delta of each product is folded into the op after it (`Expand`), so that it adds no launch.
`models/fuse.py` recognises such layers in a transformers model and proves them equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from loramux.kernels import (
    Activation,
    Expand,
    NormMode,
    add_rms_norm,
    gated,
    linear,
    rms_norm,
    rope_kv,
)
from loramux.layers.attention import PagedAttention
from loramux.layers.batch import Overlay, StepBatch
from loramux.layers.linear import LinearSlice, MergedLinear
from loramux.models.mrope import MRope
from loramux.models.norms import FusedRMSNorm


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """An RMS norm's weight [D] and manner."""

    weight: torch.Tensor
    eps: float
    mode: NormMode

    @classmethod
    def of(cls, module: FusedRMSNorm) -> Norm:
        return cls(module.weight.data, module.eps, module.mode)


@dataclass(frozen=True, slots=True, eq=False)
class GatedMLP:
    """down(activation(gate(x)) * up(x))."""

    gate_up: MergedLinear
    down: MergedLinear
    activation: Activation

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, Expand | None]:
        """x [T, D] -> what it adds [T, D], without the delta still to be added."""
        gate_up, expand = self.gate_up.project(x)  # [T, 2 I]
        inner = gated(gate_up, self.activation, expand)  # [T, I]
        del gate_up, expand
        return self.down.project(inner)  # [T, D]


@dataclass(slots=True, eq=False)
class FusedLayer:
    """One decoder layer. `after_attention` and `after_mlp` are norms of a branch's own output, as
    Gemma has them; `rope` names the table of angles that the layer turns by."""

    qkv: MergedLinear
    o: MergedLinear
    mlp: GatedMLP | nn.Module
    """A module computes itself: experts, mostly, with whatever stands around them."""

    attention: PagedAttention
    before_attention: Norm
    before_mlp: Norm
    rope: str
    head_norms: tuple[Norm, Norm] | None = None  # of queries and of keys
    after_attention: Norm | None = None
    after_mlp: Norm | None = None

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        following: Norm,
        table: torch.Tensor,
        batch: StepBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (normed) and residual, both [T, D] -> the same for the layer whose norm is `following`."""
        norm = self.before_mlp
        y, expand = self._attend(x, table, batch)  # [T, D]
        post = None if self.after_attention is None else self.after_attention.weight
        x, residual = add_rms_norm(y, residual, norm.weight, norm.eps, norm.mode, post, expand)
        del y, expand  # the MLP below takes most memory of all: nothing dead may lie beside it
        y, expand = self._feed_forward(x)  # [T, D]
        post = None if self.after_mlp is None else self.after_mlp.weight
        return add_rms_norm(
            *(y, residual, following.weight, following.eps, following.mode, post, expand)
        )

    def _attend(
        self, x: torch.Tensor, table: torch.Tensor, batch: StepBatch
    ) -> tuple[torch.Tensor, Expand | None]:
        """x [T, D] -> what attention adds [T, D], without the delta still to be added."""
        attention = self.attention
        assert batch.positions is not None and batch.slots is not None
        assert attention.k_cache is not None and attention.v_cache is not None
        qkv, expand = self.qkv.project(x)  # [T, (H + 2 Hkv) Dh]
        q = rope_kv(
            *(qkv, table, batch.positions, batch.slots, attention.k_cache, attention.v_cache),
            *(attention.num_heads, *self._head_norms(), expand),
        )  # [T, H, Dh]
        attended = attention.attend(q)  # [T, H, Dh]
        return self.o.project(attended.view(attended.shape[0], -1))  # [T, D]

    def _feed_forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Expand | None]:
        """x [T, D] -> what the MLP adds [T, D], without the delta still to be added."""
        if isinstance(self.mlp, GatedMLP):
            return self.mlp.project(x)  # [T, D]
        output = self.mlp(x.unsqueeze(0))  # [1, T, D]
        y = output[0] if isinstance(output, tuple) else output  # [1, T, D]
        return y[0], None

    def _head_norms(
        self,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor] | None, float, NormMode]:
        if self.head_norms is None:
            return None, 0.0, "llama"
        queries, keys = self.head_norms
        return (queries.weight, keys.weight), queries.eps, queries.mode


@dataclass(slots=True, eq=False)
class FusedDecoder:
    """The whole model. `tables` [P, rot] by name, see `rope_kv`; `softcap` bends the logits.

    With an `mrope` the tables have `extra_rows` behind the `num_positions` of which they have angles."""

    embedding: nn.Module
    layers: list[FusedLayer]
    final: Norm
    head: nn.Module
    tables: dict[str, torch.Tensor]
    batch: StepBatch
    softcap: float = 0.0
    mrope: MRope | None = None
    num_positions: int = 0
    extra_rows: int = 0

    def set_positions(self, positions: torch.Tensor) -> int:
        """Make the angles of tokens at `positions` [3, T] int64, below `num_positions`, in time, height
        and width, for the step that follows on this stream. The i-th of them is at the position that is
        returned, plus i. Raises ValueError for more than `extra_rows`."""
        if self.mrope is None or positions.shape[1] > self.extra_rows:
            raise ValueError(f"no rows for {positions.shape[1]} tokens. This is a bug.")
        for table in self.tables.values():
            self.mrope.gather(table, positions, self.num_positions)
        return self.num_positions

    tap: Callable[[torch.Tensor], None] | None = None
    """Given the final hidden states [T, D] of each forward, see `models/hidden.py`."""

    def forward(
        self,
        ids: torch.Tensor,
        keep: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        overlay: Overlay | None = None,
    ) -> torch.Tensor:
        """Tokens [T] -> logits [B, V] of rows `keep` [B], or of all where that is None.

        `out` [B, V] takes the logits, and is what is returned. The vectors of `overlay` are as the
        towers make them: models that scale embeddings do so in `embedding`, before."""
        # Held here, the embeddings would stay in memory beside the largest tensors of a layer.
        x = self.body(self._embed(ids, overlay), overlay)  # [T, D]
        return self.logits(x if keep is None else x[keep], out)  # [B, V]

    def _embed(self, ids: torch.Tensor, overlay: Overlay | None) -> torch.Tensor:
        """[T] -> [T, D], with the vectors of media in their places."""
        residual: torch.Tensor = self.embedding(ids)  # [T, D]
        if overlay is not None:
            residual[overlay.rows] = overlay.vectors[0].to(residual.dtype)  # [M, D]
        return residual

    def body(self, residual: torch.Tensor, overlay: Overlay | None = None) -> torch.Tensor:
        """Embeddings [T, D], which are not kept, -> final hidden states [T, D]."""
        deep = 0 if overlay is None else len(overlay.vectors) - 1
        first = self.layers[0].before_attention
        x = rms_norm(residual, first.weight, first.eps, first.mode)  # [T, D]
        norms = [layer.before_attention for layer in self.layers[1:]] + [self.final]
        for i, (layer, following) in enumerate(zip(self.layers, norms, strict=True)):
            table = self.tables[layer.rope]
            x, residual = layer.forward(x, residual, following, table, self.batch)
            if overlay is not None and i < deep:
                _add_behind(x, residual, following, overlay.rows, overlay.vectors[1 + i])
        if self.tap is not None:
            self.tap(x)
        return x

    def logits(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states x [B, D] -> [B, V], in `out` if that is given."""
        logits = _head(self.head, x, out)  # [B, V]
        if self.softcap:  # in place: logits of many rows are large
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def _add_behind(
    x: torch.Tensor,
    residual: torch.Tensor,
    following: Norm,
    rows: torch.Tensor,
    vectors: torch.Tensor,
) -> None:
    """Add `vectors` [M, D] to some rows of `residual` [T, D], and norm these rows of `x` again."""
    total = residual[rows] + vectors.to(residual.dtype)  # [M, D]
    residual[rows] = total  # [M, D]
    x[rows] = rms_norm(total, following.weight, following.eps, following.mode)  # [M, D]


def _head(head: nn.Module, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """x [B, D] -> logits [B, V], in `out` if that is given."""
    if out is not None:
        weight = _plain_weight(head)  # [V, D]
        if weight is not None:
            return torch.mm(x, weight.t(), out=out)  # [B, V]
        return out.copy_(_head(head, x, None))  # [B, V]
    if type(head) is nn.Linear:
        return linear(x, head.weight, head.bias)  # [B, V]
    logits: torch.Tensor = head(x)  # [B, V]
    return logits


def _plain_weight(head: nn.Module) -> torch.Tensor | None:
    """The weight [V, D] of a head that is a product with it and nothing else."""
    if type(head) is nn.Linear:
        return head.weight if head.bias is None else None
    if isinstance(head, LinearSlice):
        merged = head.merged
        plain = merged.is_product and merged.num_slices == 1 and merged.bias is None
        return merged.weight if plain else None
    return None
