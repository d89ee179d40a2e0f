"""The gains and shifts of an adapter's layers, worked out once, when it is read: see `adapters.affine`.

Several ranks have parts of most weights: each measures its own, and the sums of squares add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from loramux.adapters.affine import gain_and_shift, squared_lengths
from loramux.adapters.weights import AdapterWeights, Vectors
from loramux.errors import AdapterRejected
from loramux.layers.linear import MergedLinear
from loramux.models.attach import Attached
from loramux.parallel import Cut, Group, all_of


@dataclass(frozen=True, slots=True)
class _Layer:
    """One module with vectors, as this rank has it."""

    name: str
    merged: MergedLinear
    index: int
    cut: Cut
    start: int  # of its outputs among those of all such modules


class Affines:
    """Works gains and shifts out for the model `attached`, for a pool of `dtype`.

    `beside` is a group for the thread that loads, on CPU tensors: of most layers a rank has a part."""

    def __init__(self, attached: Attached, dtype: torch.dtype, beside: Group):
        self._attached = attached
        self._dtype = dtype
        self._group = beside

    def of(self, weights: AdapterWeights) -> Vectors:
        """Module -> [2, out] on the CPU, of all ranks. Every rank must ask at the same time.

        Raises AdapterRejected where the base model has no bias to replace, and on every rank what one of
        them raises."""
        if not weights.layout.vectors:
            return {}
        layers, width = self._layers(weights)
        found = torch.zeros(
            3, width + 1
        )  # [3, F + 1]: squared lengths, biases, which have one; a flag
        failure: Exception | None = None
        try:
            first = self._are_first(layers)
            for layer in layers:
                self._measure(layer, weights, found, first[layer.name])
        except Exception as error:  # the others wait in the sum
            failure = error
            found[:, -1] = 1
        found = self._group.all_reduce(found)  # [3, F + 1]
        if failure is not None:
            raise failure
        if found[0, -1]:
            raise RuntimeError("another rank could not measure the weights")
        return dict(self._vectors(layers, weights, found))

    def _layers(self, weights: AdapterWeights) -> tuple[list[_Layer], int]:
        schema, cuts = self._attached.schema, self._attached.shards.cuts
        layers, width = [], 0
        for name in sorted(weights.layout.vectors):
            spec = schema.modules[name]
            whole = Cut("whole", all_of(spec.out_features), *(all_of(spec.in_features),) * 2)
            cut = cuts.get(name, whole)
            merged = self._attached.sites[spec.site]
            layers.append(_Layer(name, merged, spec.slice_index, cut, width))
            width += spec.out_features
        return layers, width

    def _are_first(self, layers: list[_Layer]) -> dict[str, bool]:
        """Whether no lower rank puts out the same features, by module."""
        starts = torch.tensor([layer.cut.output.start for layer in layers])  # [L]
        of_all = self._group.all_gather(starts)  # [N, L]
        before = of_all[: self._group.rank]  # [n, L]
        return {
            layer.name: not bool((before[:, at] == starts[at]).any())
            for at, layer in enumerate(layers)
        }

    def _measure(
        self, layer: _Layer, weights: AdapterWeights, found: torch.Tensor, is_first: bool
    ) -> None:
        """Fill in this rank's share of the sums over all."""
        cut = layer.cut
        here = slice(layer.start + cut.output.start, layer.start + cut.output.stop)
        if is_first:
            bias = layer.merged.bias
            if bias is not None:
                own = bias[layer.merged.starts[layer.index] : layer.merged.starts[layer.index + 1]]
                found[1, here], found[2, here] = own.float().cpu(), 1
        stored = weights.layout.vectors[layer.name]
        if stored.magnitude is None or not (is_first or cut.kind == "row"):
            return
        pair = weights.layout.pairs[layer.name]
        a = pair.a.view(weights.buffer)[:, cut.input.slice]  # [r, in']
        b = pair.b.view(weights.buffer)[cut.output.slice]  # [out', r]
        found[0, here] = squared_lengths(layer.merged.dense(layer.index), a, b, pair.scale).cpu()

    def _vectors(
        self, layers: list[_Layer], weights: AdapterWeights, found: torch.Tensor
    ) -> Iterator[tuple[str, torch.Tensor]]:
        refused = []
        for layer in layers:
            stored = weights.layout.vectors[layer.name]
            every = slice(layer.start, layer.start + stored.columns)
            squares, bias, has_bias = found[:, every]  # [out] each
            if stored.bias is not None and not bool(has_bias.all()):
                refused.append(f"{layer.name} has no bias in the base model that could be replaced")
                continue
            pair = weights.layout.pairs.get(layer.name)
            scale = pair.scale if pair else 0.0
            vectors = gain_and_shift(stored, weights.buffer, squares, bias, scale).to(self._dtype)
            if not bool(vectors.isfinite().all()):
                refused.append(f"the gains and shifts of {layer.name} overflow in {self._dtype}")
            yield layer.name, vectors
        if refused:
            raise AdapterRejected(weights.ref.name, refused)
