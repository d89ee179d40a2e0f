"""The experts of a mixture-of-experts layer, each token's adapters on those that it was given to.

    x [T, H] ── sorted by expert, then composition ── gate_up ── act(gate) * up ── down ── weighted sum
                                                       + B A x                   + B A x

The adapter pool of the experts is an ordinary one whose rows are there once for each expert: rank row
k is row e * R + k for expert e. So, once the rows are sorted, the ops of linear layers serve these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from loramux.kernels import (
    Activation,
    Expand,
    LoRASite,
    Routing,
    Segments,
    WorkList,
    combine,
    gated,
    grouped_linear,
    lora_delta,
    lora_expand,
    lora_shrink,
    route,
    shrink_parts,
    take_rows,
)
from loramux.layers.batch import LoRAStep, StepBatch
from loramux.layers.linear import ROW_STEP
from loramux.layers.sharded import empty_site
from loramux.parallel import ALONE, Cut, Group

NAME = "loramux_experts"

Choice = tuple[torch.Tensor, torch.Tensor]
"""The experts of each token [T, K] and their weights [T, K]."""

Gate = Callable[[torch.Tensor], torch.Tensor]
"""Gate and up side by side [S, 2 I] -> what goes down [S, I]."""


@dataclass(slots=True, eq=False)
class ExpertWeights:
    """What a layer computes with: views of the model's own parameters, in any strides."""

    gate_up: torch.Tensor  # [E, 2 I, H]: gate, then up
    down: torch.Tensor  # [E, H, I]
    gate_up_bias: torch.Tensor | None  # [E, 2 I]
    down_bias: torch.Tensor | None  # [E, H]
    gate: Gate
    activation: Activation | None
    """What `gate` does, where it is one that the fused op knows."""


class Experts:
    """The experts of one layer. `up_site` and `down_site` are their parts of the adapter pool, or None
    where no LoRA is served; `shares_a` says whether gate and up are one slice of `up_site`, with one A.

    With several ranks each holds a stripe of every expert's inner features, cut as `cuts` says:
    (gate or up, down)."""

    def __init__(
        self,
        weights: ExpertWeights,
        batch: StepBatch,
        *,
        shares_a: bool,
        group: Group = ALONE,
        cuts: tuple[Cut, Cut] | None = None,
        fully: bool = False,
    ):
        self.weights = weights
        self.num_experts, width, self.hidden = weights.gate_up.shape
        self.inner = width // 2  # on this rank
        self.shares_a = shares_a
        self.most_pairs = 0  # experts of a token, as seen in the probe
        self.seen: list[Choice] | None = None  # where somebody keeps what was chosen
        self.forced: Choice | None = None  # where somebody else chooses, see `models/choices.py`
        self.up_site: LoRASite | None = None
        self.down_site: LoRASite | None = None
        self.dealt_site: LoRASite | None = None  # A of gate and up where its rows are dealt out
        self._batch = batch
        self._group = group
        self._cuts = cuts
        self._fully = fully

    @property
    def device(self) -> torch.device:
        return self.weights.gate_up.device

    @property
    def sites(self) -> list[LoRASite]:
        return [site for site in (self.up_site, self.down_site) if site is not None]

    def attach_sites(self, rows: int, dtype: torch.dtype) -> None:
        """Give this layer its part of the adapter pool: at least `rows` rank rows for each expert."""
        rows += -rows % ROW_STEP
        starts = (0, 2 * self.inner) if self.shares_a else (0, self.inner, 2 * self.inner)
        slices, deal = len(starts) - 1, self._group.size if self._fully else 1
        here = self.hidden if deal == 1 else 0
        self.up_site = self._site(slices, rows, here, starts, dtype)
        out = self.hidden if deal == 1 or self._cuts is None else self._cuts[1].b_output.size
        self.down_site = self._site(1, rows, self.inner, (0, out), dtype)
        if deal > 1:
            nothing = (0,) * (slices + 1)
            self.dealt_site = self._site(slices, -(-rows // deal), self.hidden, nothing, dtype)

    def _site(
        self, slices: int, rows: int, features: int, starts: tuple[int, ...], dtype: torch.dtype
    ) -> LoRASite:
        count = self.num_experts
        return empty_site(
            *(slices, count * rows, features, starts, dtype, self.device), experts=count
        )

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, H], the experts of each token [T, K] and their weights [T, K] -> [T, H]."""
        segments, lora = self._batch.segments, self._batch.lora
        self.most_pairs = max(self.most_pairs, chosen.shape[1])
        if self.forced is not None:
            chosen, weights = self.forced
        if self.seen is not None:
            self.seen.append((chosen, weights))
        if self.up_site is None or (segments is None and lora is None):
            routing = route(chosen, self.num_experts, None, 0)
            y = self._plain(take_rows(x, routing.order, chosen.shape[1]), routing, chosen)
        elif lora is not None:
            routing = route(chosen, self.num_experts, lora.work, self._rows(self.up_site))
            y = self._with_work(x, routing, chosen, lora)  # [S, H]
        else:
            assert segments is not None
            routing, own = route_segments(
                chosen, self.num_experts, segments, self._rows(self.up_site)
            )
            sorted_x = take_rows(x, routing.order, chosen.shape[1])  # [S, H]
            y = self._with_segments(sorted_x, routing, chosen, own)  # [S, H]
        return self._group.all_reduce(combine(y, routing.places, weights))  # [T, H]

    def _rows(self, site: LoRASite) -> int:
        return site.row_r.shape[1] // self.num_experts

    # --- with adapters -------------------------------------------------------------------------

    def _with_segments(
        self, x: torch.Tensor, routing: Routing, chosen: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """x [S, H] in the order of `routing` -> [S, H]; on CPUs."""
        assert self.up_site is not None and self.down_site is not None
        gate_up = self._gate_up(x, routing, chosen)  # [S, 2 I]
        lora_delta(gate_up, x, self.up_site, segments)
        inner = self.weights.gate(gate_up)  # [S, I]
        y = self._down(inner, routing, chosen)  # [S, H]
        lora_delta(y, inner, self.down_site, segments)
        return y

    def _with_work(
        self, x: torch.Tensor, routing: Routing, chosen: torch.Tensor, lora: LoRAStep
    ) -> torch.Tensor:
        """x [T, H] -> [S, H] in the order of `routing`."""
        assert self.up_site is not None and self.down_site is not None
        work, top_k = routing.work, chosen.shape[1]
        assert work is not None
        # All routing first: the kernels behind `take_rows` may ask for the work before they wait for it.
        dealt = self._route_dealt(chosen, lora) if self._fully else None
        sorted_x = take_rows(x, routing.order, top_k)  # [S, H]
        if dealt is not None:
            h = self._shrink_dealt(sorted_x, dealt, lora.columns)  # [1, S, W]
        else:  # out of x, which the cache may hold whole
            h = self._shrink(x, self.up_site, work, lora.columns, routing.order, top_k)  # [P, S, W]
        gate_up = self._gate_up(sorted_x, routing, chosen)  # [S, 2 I]
        inner = self._gate(gate_up, Expand(self.up_site, h, work))  # [S, I]
        h = self._shrink(inner, self.down_site, work, lora.columns)  # [P, S, W]
        if not self._fully:
            return self._down(inner, routing, chosen, Expand(self.down_site, h, work))  # [S, H]
        y = self._down(inner, routing, chosen)  # [S, H]
        assert self._cuts is not None
        h = self._group.sum_parts(h)  # [S, W]
        lora_expand(y[:, self._cuts[1].b_output.slice], Expand(self.down_site, h[None], work))
        return y

    def _shrink(
        self,
        x: torch.Tensor,
        site: LoRASite,
        work: WorkList,
        columns: int,
        order: torch.Tensor | None = None,
        top_k: int = 1,
    ) -> torch.Tensor:
        """x [S, K] -> [P, S, W]; columns that no member owns hold anything. With `order` x is [T, K]."""
        rows = x.shape[0] if order is None else order.shape[0]
        parts = shrink_parts(rows, x.shape[1], work.max_chunks)
        width = columns * site.num_slices
        h = x.new_empty(parts, rows, width, dtype=torch.float32)  # [P, S, W]
        lora_shrink(x, site, work, h, order, top_k)
        return h

    def _route_dealt(self, chosen: torch.Tensor, lora: LoRAStep) -> WorkList | None:
        """The work in the rows of A that are dealt out to this rank."""
        assert self.dealt_site is not None and lora.dealt is not None
        return route(chosen, self.num_experts, lora.dealt, self._rows(self.dealt_site)).work

    def _shrink_dealt(self, x: torch.Tensor, work: WorkList, columns: int) -> torch.Tensor:
        """x [S, H] -> [1, S, W] of all ranks' rows of A: rank row k comes from rank k % N."""
        assert self.dealt_site is not None
        deal, site = self._group.size, self.dealt_site
        width = -(-columns // deal)
        h = self._shrink(x, site, work, width)  # [P, S, W']
        return self._group.gather_runs(h, site.num_slices).unsqueeze(0)  # [1, S, W]

    # --- the base model ------------------------------------------------------------------------

    def _plain(self, x: torch.Tensor, routing: Routing, chosen: torch.Tensor) -> torch.Tensor:
        """x [S, H] in the order of `routing` -> [S, H], without adapters."""
        return self._down(self._gate(self._gate_up(x, routing, chosen), None), routing, chosen)

    def _gate(self, gate_up: torch.Tensor, expand: Expand | None) -> torch.Tensor:
        """[S, 2 I] -> [S, I], with the delta of `expand` added first."""
        if self.weights.activation is not None:
            return gated(gate_up, self.weights.activation, expand)
        if expand is not None:
            lora_expand(gate_up, expand)
        return self.weights.gate(gate_up)

    def _gate_up(self, x: torch.Tensor, routing: Routing, chosen: torch.Tensor) -> torch.Tensor:
        y = grouped_linear(x, self.weights.gate_up, routing.ends)  # [S, 2 I]
        return _add_bias(y, self.weights.gate_up_bias, routing, chosen)

    def _down(
        self,
        x: torch.Tensor,
        routing: Routing,
        chosen: torch.Tensor,
        expand: Expand | None = None,
    ) -> torch.Tensor:
        bias = self.weights.down_bias if self._group.rank == 0 else None  # of a sum it counts once
        y = grouped_linear(x, self.weights.down, routing.ends, expand)  # [S, H]
        return _add_bias(y, bias, routing, chosen)


def _add_bias(
    y: torch.Tensor, bias: torch.Tensor | None, routing: Routing, chosen: torch.Tensor
) -> torch.Tensor:
    """y [S, N] plus the bias [E, N] of each row's expert, in place."""
    if bias is not None:
        y += bias[chosen.reshape(-1)[routing.order.long()]]  # [S, N]
    return y


def route_segments(
    chosen: torch.Tensor, num_experts: int, segments: Segments, rows: int
) -> tuple[Routing, Segments]:
    """`route` on a CPU, with the segments of the sorted pairs: one expert and one composition each."""
    count, top_k = chosen.shape
    token = torch.full((count,), -1, dtype=torch.long)  # [T]: its segment
    for g, (start, end) in enumerate(
        zip(segments.starts.tolist(), segments.ends.tolist(), strict=True)
    ):
        token[start:end] = g
    pair = token.repeat_interleave(top_k)  # [S]
    keys = chosen.reshape(-1).long() * (segments.num_segments + 1) + pair + 1  # [S]
    sorted_keys, order = torch.sort(keys, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    counts = torch.bincount(chosen.reshape(-1).long(), minlength=num_experts)  # [E]
    ends = counts.cumsum(0).int()  # [E]
    routing = Routing(order.int(), places.int(), ends, None)
    return routing, _sorted_segments(sorted_keys, segments, rows)


def _sorted_segments(keys: torch.Tensor, segments: Segments, rows: int) -> Segments:
    """The runs of equal `keys` [S] that have adapters."""
    values, lengths = torch.unique_consecutive(keys, return_counts=True)  # [G'] each
    ends = lengths.cumsum(0)  # [G']
    expert = values // (segments.num_segments + 1)  # [G']
    source = values % (segments.num_segments + 1) - 1  # [G']
    kept = source >= 0
    ends, lengths, expert, source = ends[kept], lengths[kept], expert[kept], source[kept]
    offsets: list[int] = [0]
    members: list[int] = []
    shifts: list[int] = []
    bounds = segments.member_offsets.tolist()
    for g, e in zip(source.tolist(), expert.tolist(), strict=True):
        members += range(bounds[g], bounds[g + 1])
        shifts += [e * rows] * (bounds[g + 1] - bounds[g])
        offsets.append(len(members))
    index = torch.tensor(members, dtype=torch.long)  # [M']
    shift = torch.tensor(shifts, dtype=torch.int32)  # [M']
    return Segments(
        starts=(ends - lengths).int(),
        ends=ends.int(),
        member_offsets=torch.tensor(offsets, dtype=torch.int32),
        member_rows=segments.member_rows[index] + shift,
        member_scales=segments.member_scales[index].contiguous(),
        num_segments=len(source),
    )


def experts_function(
    module: nn.Module, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls through its experts registry."""
    experts: Experts = module.loramux_experts  # type: ignore[assignment]
    return experts.forward(hidden, chosen, weights)


def own_sites(layers: Sequence[Experts]) -> list[LoRASite]:
    """Those of all layers, in the order that `ModuleSpec.site` counts them in."""
    return [site for layer in layers for site in layer.sites]
