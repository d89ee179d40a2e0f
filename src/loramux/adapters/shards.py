"""What one rank needs of an adapter, as an adapter of its own: smaller matrices in a smaller buffer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch

from loramux.adapters.weights import AdapterWeights, Layout, Stored, StoredPair
from loramux.parallel import Cut

ALIGNMENT = 16  # bytes from one matrix to the next

Views = tuple[torch.Tensor, torch.Tensor, float]
"""A [r, in], B [out, r] and the scale of a module: views of some buffer."""


def cut_adapter(weights: AdapterWeights, cuts: Mapping[str, Cut]) -> AdapterWeights:
    """The columns of A and the rows of B of this rank. Where rows of A are dealt out, A is left away:
    see `dealt_rows`."""
    return _packed(weights, _own(weights, cuts), weights.ref.max_r)


def dealt_rows(weights: AdapterWeights, cuts: Mapping[str, Cut], rank: int) -> AdapterWeights:
    """The rows of A that are dealt out to this rank, without B."""
    deal = max((cut.deal for cut in cuts.values()), default=1)
    return _packed(weights, _dealt(weights, cuts, rank), -(-weights.ref.max_r // deal))


def _own(weights: AdapterWeights, cuts: Mapping[str, Cut]) -> Iterator[tuple[str, Views]]:
    for name, a, b, scale in _pairs(weights):
        cut = cuts[name]
        columns = cut.input.slice if cut.deal == 1 else slice(0, 0)
        yield name, (a[:, columns], b[cut.b_output.slice], scale)


def _dealt(
    weights: AdapterWeights, cuts: Mapping[str, Cut], rank: int
) -> Iterator[tuple[str, Views]]:
    for name, a, b, scale in _pairs(weights):
        deal = cuts[name].deal
        if deal > 1:
            yield name, (a[rank::deal], b[:0, rank::deal], scale)


def _pairs(weights: AdapterWeights) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, float]]:
    for name, pair in weights.layout.pairs.items():
        yield name, pair.a.view(weights.buffer), pair.b.view(weights.buffer), pair.scale


def _packed(
    weights: AdapterWeights, parts: Iterator[tuple[str, Views]], max_r: int
) -> AdapterWeights:
    """`parts` side by side in a buffer of their own."""
    found = list(parts)
    pairs: dict[str, StoredPair] = {}
    end = 0
    for name, (a, b, scale) in found:
        places = []
        for matrix in (a, b):
            place = Stored(end, matrix.shape[0], matrix.shape[1], matrix.dtype)
            places.append(place)
            end += -(-place.num_bytes // ALIGNMENT) * ALIGNMENT
        pairs[name] = StoredPair(places[0], places[1], scale)
    buffer = torch.empty(end, dtype=torch.uint8)  # [bytes]
    for name, (a, b, _) in found:
        _copy(pairs[name].a.view(buffer), a)  # [r, in]
        _copy(pairs[name].b.view(buffer), b)  # [out, r]
    layout = Layout(pairs, ((0, 0, end),))
    return AdapterWeights(
        replace(weights.ref, max_r=max_r), buffer, replace(weights.source, layout=layout)
    )


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """By this thread alone: torch would wake its whole team for each of a thousand small matrices, which
    took 3 s an adapter on 64 cores."""
    whole = INTEGERS[source.element_size()]
    np.copyto(target.view(whole).numpy(), source.view(whole).numpy())
