"""What one rank needs of an adapter, as an adapter of its own: smaller matrices in a smaller buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from loramux.adapters.expert_shards import ALIGNMENT, Piece, dealt_experts, own_experts
from loramux.adapters.weights import AdapterWeights, Layout, Stored, StoredExperts, StoredPair
from loramux.parallel import Cut

Views = tuple[torch.Tensor, torch.Tensor, float]
"""A [r, in], B [out, r] and the scale of a module: views of some buffer."""


def cut_adapter(weights: AdapterWeights, cuts: Mapping[str, Cut]) -> AdapterWeights:
    """The columns of A and the rows of B of this rank. Where rows of A are dealt out, A is left away:
    see `dealt_rows`."""
    experts = partial(own_experts, weights, cuts)
    own = _packed(weights, _own(weights, cuts), experts, weights.ref.max_r)
    return replace(own, affine=_own_affine(weights, cuts))


def _own_affine(weights: AdapterWeights, cuts: Mapping[str, Cut]) -> dict[str, torch.Tensor]:
    """Gains and shifts [2, out'] of what this rank puts out."""
    found = {}
    for name, vectors in weights.affine.items():
        cut = cuts.get(name)
        found[name] = vectors if cut is None else vectors[:, cut.output.slice]
    return found


def dealt_rows(weights: AdapterWeights, cuts: Mapping[str, Cut], rank: int) -> AdapterWeights:
    """The rows of A that are dealt out to this rank, without B."""
    deal = max((cut.deal for cut in cuts.values()), default=1)
    experts = partial(dealt_experts, weights, cuts, rank)
    return _packed(weights, _dealt(weights, cuts, rank), experts, -(-weights.ref.max_r // deal))


def _own(weights: AdapterWeights, cuts: Mapping[str, Cut]) -> Iterator[tuple[str, Views]]:
    for name, a, b, scale in _pairs(weights):
        if (cut := cuts.get(name)) is None:  # a layer that every rank has whole
            yield name, (a, b, scale)
            continue
        columns = cut.input.slice if cut.deal == 1 else slice(0, 0)
        yield name, (a[:, columns], b[cut.b_output.slice], scale)


def _dealt(
    weights: AdapterWeights, cuts: Mapping[str, Cut], rank: int
) -> Iterator[tuple[str, Views]]:
    for name, a, b, scale in _pairs(weights):
        deal = cuts[name].deal if name in cuts else 1
        if deal > 1:
            yield name, (a[rank::deal], b[:0, rank::deal], scale)


def _pairs(weights: AdapterWeights) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, float]]:
    for name, pair in weights.layout.pairs.items():
        yield name, pair.a.view(weights.buffer), pair.b.view(weights.buffer), pair.scale


def _packed(
    weights: AdapterWeights,
    parts: Iterator[tuple[str, Views]],
    of_experts: Callable[[int], tuple[dict[str, StoredExperts], list[Piece], int]],
    max_r: int,
) -> AdapterWeights:
    """`parts`, and those of experts behind them, side by side in a buffer of their own."""
    found = list(parts)
    pairs: dict[str, StoredPair] = {}
    end = 0
    for name, (a, b, scale) in found:
        places: list[Stored] = []
        for matrix in (a, b):
            stored = Stored(end, matrix.shape[0], matrix.shape[1], matrix.dtype)
            places.append(stored)
            end += -(-stored.num_bytes // ALIGNMENT) * ALIGNMENT
        pairs[name] = StoredPair(places[0], places[1], scale)
    experts, pieces, end = of_experts(end)
    buffer = torch.empty(end, dtype=torch.uint8)  # [bytes]
    for name, (a, b, _) in found:
        _copy(pairs[name].a.view(buffer), a)  # [r, in]
        _copy(pairs[name].b.view(buffer), b)  # [out, r]
    for place, matrix in pieces:
        flat = buffer[place : place + matrix.numel() * matrix.element_size()]  # [bytes]
        _copy(flat.view(matrix.dtype).view(matrix.shape), matrix)  # [rows, columns]
    layout = Layout(pairs, ((0, 0, end),), experts)
    return AdapterWeights(
        replace(weights.ref, max_r=max_r), buffer, replace(weights.source, layout=layout)
    )


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """By this thread alone: torch would wake its whole team for each of a thousand small matrices, which
    took 3 s an adapter on 64 cores."""
    whole = INTEGERS[source.element_size()]
    np.copyto(target.view(whole).numpy(), source.view(whole).numpy())
