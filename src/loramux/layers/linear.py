"""Linear layers that add each token's own LoRA delta, computed once for all that share an input.

    q_proj(x) ─┐
    k_proj(x) ─┼─ MergedLinear: one base product, one LoRA call   y [T, Nq+Nk+Nv]
    v_proj(x) ─┘

A transformers layer calls q_proj, k_proj and v_proj with the same tensor object. Each is replaced by
a `LinearSlice`; the first that is called computes the whole, the others take their columns. So the
model's own forward stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from loramux.kernels import (
    ONE_PLACE,
    Expand,
    LoRASite,
    PackedLinear,
    linear,
    lora_delta,
    lora_expand,
    lora_shrink,
    shrink_parts,
)
from loramux.layers.batch import LoRAStep, StepBatch

ROW_STEP = 16  # the pool's rows come in these, so that every base product keeps aligned rows


class MergedLinear:
    """Linear layers with one input, stacked along the output.

    `weight` [N, K] and `bias` [N] or None; slice s owns columns `starts[s]:starts[s+1]` of the
    output. `site` is its part of the adapter pool, or None where no LoRA is served. It is no nn.Module:
    it owns no parameter, and a plain object is cheaper to write to in every call.
    """

    takes_rows = True
    """Whether A may stand under the weight."""

    def __init__(self, linears: Sequence[nn.Linear], batch: StepBatch):
        self.in_features = linears[0].in_features
        self.starts = [0]
        for one in linears:
            self.starts.append(self.starts[-1] + one.out_features)
        self.weight: torch.Tensor | None = _stack([one.weight for one in linears])  # [N, K]
        self.bias = _stack_bias(linears)  # [N]
        self.dtype = linears[0].weight.dtype
        self.site: LoRASite | None = None
        self.computations = (
            0  # base products since the start; more than one a step means no sharing
        )
        self._batch = batch
        self._packed: PackedLinear | None = None
        self._stacked: torch.Tensor | None = None  # [N + S R, K]: weight, and A of the pool
        self._stacked_bias: torch.Tensor | None = None  # [N + S R]
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        self._remaining = 0

    @property
    def num_slices(self) -> int:
        return len(self.starts) - 1

    @property
    def is_product(self) -> bool:
        """Whether the layer is a product with `weight` and nothing more, but for bias and adapters."""
        return True

    def whole_features(self, index: int) -> tuple[int, int]:
        """(in, out) of slice `index`, over all ranks."""
        return self.in_features, self.starts[index + 1] - self.starts[index]

    @property
    def extends_product(self) -> bool:
        """Whether pool rows can be taken along in the base product."""
        return self._stacked is not None

    row_sharers = 1
    """Ranks among which the rows of A are dealt out."""

    @property
    def shrink_site(self) -> LoRASite | None:
        """Where the A of this rank stands."""
        return self.site

    def product_weight(self, rows: int) -> torch.Tensor:
        """The weight, and under it what this rank has of the first `rows` pool rows [N + S R', K]."""
        assert self._stacked is not None
        return self._stacked[: self.out_features + self.num_slices * (rows // self.row_sharers)]

    def extended_product(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """x [T, K] -> [T, N + S R'] by `product_weight`: what the layer computes, and its A x."""
        weight = self.product_weight(rows)
        bias = None if self._stacked_bias is None else self._stacked_bias[: weight.shape[0]]
        return linear(x, weight, bias)

    @property
    def pool_rows(self) -> int:
        return 0 if self.site is None else self.site.a.shape[1]

    @property
    def outer_features(self) -> tuple[int, int]:
        """Of what `project` takes and gives: (in, out)."""
        return self.in_features, self.out_features

    @property
    def out_features(self) -> int:
        return self.starts[-1]

    def pack(self) -> None:
        """Put the weight in the order that the CPU's matrix product likes best (CPU only)."""
        assert self.weight is not None
        self._packed = PackedLinear(self.weight, self.bias)
        self.weight = None  # the packed copy is the only one

    @property
    def is_packed(self) -> bool:
        return self._packed is not None

    def plain(self, index: int) -> nn.Linear:
        """Slice `index` as an ordinary nn.Linear that shares the weight (before `pack`)."""
        assert self.weight is not None
        start, end = self.starts[index], self.starts[index + 1]
        plain = nn.Linear(self.in_features, end - start, bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(self.weight[start:end], requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias[start:end], requires_grad=False)
        return plain

    def attach_site(
        self,
        rows: int,
        dtype: torch.dtype,
        *,
        under_weight: bool = False,
        place_rows: int = ONE_PLACE,
    ) -> None:
        """Give this layer its part of the adapter pool: at least `rows` rank rows in `dtype`, and room
        for gains and shifts as `LoRASite` says; by default for none.

        With `under_weight` A stands under the base weight, of the same dtype, row k of slice s at
        k * S + s, if this kind of layer `takes_rows`: any first rows of the pool then extend the base
        product.
        """
        slices, device = self.num_slices, self.device
        rows += -rows % ROW_STEP
        if under_weight and self.takes_rows:
            a = self._stack_under(rows)  # [S, R, K]
        else:
            a = torch.zeros(slices, rows, self.in_features, dtype=dtype, device=device)
        self.site = LoRASite(
            a=a,
            b=torch.zeros(rows, self.out_features, dtype=dtype, device=device),
            slice_starts=tuple(self.starts),
            row_r=torch.zeros(slices, rows, dtype=torch.int32, device=device),
            row_scale=torch.zeros(slices, rows, dtype=torch.float32, device=device),
            affine=empty_affine(rows, place_rows, self.out_features, dtype, device),
            place_rows=place_rows,
        )

    def _stack_under(self, rows: int) -> torch.Tensor:
        """Move the weight into one with room for the pool below it; that room as [S, R, K]."""
        assert self.weight is not None
        slices, width = self.num_slices, self.out_features
        stacked = self.weight.new_zeros(width + slices * rows, self.in_features)  # [N + S R, K]
        stacked[:width] = self.weight
        self.weight, self._stacked = stacked[:width], stacked
        if self.bias is not None:
            self._stacked_bias = torch.cat((self.bias, self.bias.new_zeros(slices * rows)))
        return stacked[width:].view(rows, slices, self.in_features).transpose(0, 1)  # [S, R, K]

    @property
    def affine(self) -> torch.Tensor | None:
        """Gains and shifts [2, P, N], see `LoRASite.affine`."""
        return None if self.site is None else self.site.affine

    def dense(self, index: int) -> torch.Tensor:
        """The base weight of slice `index` [N_index, K]; a copy where it is packed."""
        whole = self._packed.dense() if self._packed is not None else self.weight
        assert whole is not None
        return whole[self.starts[index] : self.starts[index + 1]]  # [N_index, K]

    @property
    def device(self) -> torch.device:
        return self.weight.device if self.weight is not None else torch.device("cpu")

    def forward(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Slice `index` of the output for x [..., K] -> [..., N_index]."""
        if self._input is not x or self._output is None:
            self._output = self._compute(x)  # [..., N]
            self._input = x
            self._remaining = self.num_slices
        output: torch.Tensor = self._output
        self._remaining -= 1
        if self._remaining == 0:  # everybody has been served: keep nothing alive
            self._input = self._output = None
        if self.num_slices == 1:
            return output
        return output[..., self.starts[index] : self.starts[index + 1]]

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        y, expand = self.project(x.reshape(-1, x.shape[-1]))  # [T, N]
        if expand is not None:
            lora_expand(y, expand)
        return y.view(*x.shape[:-1], y.shape[-1])  # [..., N]

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, Expand | None]:
        """x [T, K] -> y [T, N] (any row stride), and the LoRA delta that is still to be added."""
        self.computations += 1
        if self._packed is not None:
            y = self._packed(x)  # [T, N]
        else:
            lora = self._batch.lora
            if lora is not None and self.site is not None:
                return self._project_with(x, lora, self.site)
            assert self.weight is not None
            y = linear(x, self.weight, self.bias)  # [T, N]
        segments = self._batch.segments
        if segments is not None and self.site is not None:
            lora_delta(y, x, self.site, segments)
        return y, None

    def _project_with(
        self, x: torch.Tensor, lora: LoRAStep, site: LoRASite
    ) -> tuple[torch.Tensor, Expand]:
        width = self.out_features
        if lora.base_rows and self._stacked is not None:
            z = self.extended_product(x, lora.base_rows)  # [T, N + S R']
            return z[:, :width], Expand(site, z[:, width:].unsqueeze(0), lora.work)
        parts = shrink_parts(x.shape[0], self.in_features, lora.work.max_chunks)
        h = x.new_empty(parts, x.shape[0], lora.columns * self.num_slices, dtype=torch.float32)
        y = self._shrink_beside(x, lora, site, h)  # [T, N]
        return y, Expand(site, h, lora.work)

    def _shrink_beside(
        self,
        x: torch.Tensor,
        lora: LoRAStep,
        site: LoRASite,
        h: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Fill `h` [P, T, W], and give the base product of x [T, K] in `out` [T, N]."""
        assert self.weight is not None
        if lora.stream is None:
            lora_shrink(x, site, lora.work, h)
            return linear(x, self.weight, self.bias, out)  # [T, N]
        main = torch.cuda.current_stream(x.device)
        lora.stream.wait_stream(main)
        with torch.cuda.stream(lora.stream):
            lora_shrink(x, site, lora.work, h)
        y = linear(x, self.weight, self.bias, out)  # [T, N]
        main.wait_stream(lora.stream)
        return y


class LinearSlice(nn.Module):
    """Stands where an nn.Linear stood; its product is computed with its siblings'."""

    def __init__(self, merged: MergedLinear, index: int):
        super().__init__()
        self.merged = merged
        self.index = index
        self.in_features, self.out_features = merged.whole_features(index)

    @property
    def weight(self) -> torch.Tensor:
        """Of the right shape and type, without values: some models look at the type [out, in]."""
        shape = (self.out_features, self.in_features)
        return torch.empty(shape, dtype=self.merged.dtype, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.merged.forward(x, self.index)


def empty_affine(
    rows: int, place_rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Room for gains and shifts of a pool of `rows` rank rows [2, P, width], see `LoRASite.affine`."""
    places = -(-rows // place_rows)
    return torch.zeros(2, places, width, dtype=dtype, device=device)


def _stack(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(weights) == 1:
        return weights[0].detach()
    return torch.cat([weight.detach() for weight in weights])


def _stack_bias(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    """One bias for all, with zeros for those that have none; None if nobody has one."""
    if all(one.bias is None for one in linears):
        return None
    parts = [
        one.bias.detach()
        if one.bias is not None
        else torch.zeros(one.out_features, dtype=one.weight.dtype, device=one.weight.device)
        for one in linears
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
