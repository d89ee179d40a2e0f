"""Random steps of a layer of experts: who chose which, who takes what adapters, and the factors.

The routing that is wanted is written from its text, with plain lists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

import torch
from kernel_cases import make_site
from work_lists import Span, make_work, site_to, work_to

from loramux.kernels import LoRASite, Routing, WorkList

RANKS = {2: 1, 5: 3, 9: 8, 18: 16}
"""First pool row -> rank rows; a pool has ROWS of them."""
ROWS = 37
COLUMNS = {2: 30, 5: 0, 9: 20, 18: 4}
WIDTH = 32


@dataclass(frozen=True)
class Step:
    """One composition a token (its first member, its end member; 0, 0: none) and the work list."""

    compositions: list[tuple[int, int]]
    work: WorkList


def make_step(tokens: int, rows_per_chunk: int = 8) -> Step:
    """Base rows in three places, sums, one composition twice; the last rows are in no chunk."""
    kinds: list[list[int]] = [[9], [], [5, 18], [2], [18, 9, 2], [], [9], []]
    covered = tokens - tokens // 8
    cuts = sorted([0, covered, *torch.randint(covered + 1, (len(kinds) - 1,)).tolist()])
    spans: list[Span] = [
        (start, end, kind) for start, end, kind in zip(cuts, cuts[1:], kinds, strict=False)
    ]
    spans = [span for span in spans if span[0] < span[1]]
    compositions, member = [(0, 0)] * tokens, 0
    for start, end, kind in spans:
        if kind:
            compositions[start:end] = [(member, member + len(kind))] * (end - start)
        member += len(kind)
    return Step(compositions, make_work(spans, COLUMNS, RANKS, rows_per_chunk))


def choose(tokens: int, top_k: int, experts: int, among: int = 0) -> torch.Tensor:
    """[T, K] int64: different experts for each token, with `among` only out of so many."""
    few = torch.randperm(experts)[: among or experts]
    return torch.stack([few[torch.randperm(len(few))[:top_k]] for _ in range(tokens)])


def check_routing(routing: Routing, chosen: torch.Tensor, experts: int, step: Step | None) -> None:
    """Everything that `Routing` says, chunk by chunk."""
    tokens, top_k = chosen.shape
    count, flat = tokens * top_k, chosen.flatten().tolist()

    def key(pair: int) -> tuple[int, int]:
        if step is None:
            return flat[pair], 0
        first, end = step.compositions[pair // top_k]
        return flat[pair], first + 1 if first < end else 0

    order = sorted(range(count), key=lambda pair: (key(pair), pair))
    assert routing.order.dtype == routing.places.dtype == routing.ends.dtype == torch.int32
    assert routing.order.tolist() == order
    assert routing.places[order].tolist() == list(range(count))
    assert routing.ends.tolist() == [sum(e <= expert for e in flat) for expert in range(experts)]
    if step is None:
        assert routing.work is None
        return
    work = routing.work
    assert work is not None
    wanted, row = [], 0
    size = 8 if count <= 4096 else 64
    for (expert, _), pairs in groupby(order, key=key):
        group = list(pairs)
        first, end = step.compositions[group[0] // top_k]
        for low in range(row, row + len(group), size):
            record = [low, min(low + size, row + len(group)), first, end, 0, 0, 0, 0]
            if first < end:
                p = int(step.work.member_rows[first])
                bits = int(step.work.member_scales.view(torch.int32)[first])
                record[4:] = [expert * ROWS + p, COLUMNS[p], bits, RANKS[p]]
            wanted.append(record)
        row += len(group)
    assert work.chunks.dtype == work.counts.dtype == torch.int32
    assert work.counts.tolist() == [0, len(wanted)]
    assert len(wanted) <= work.max_chunks <= min(count, len(work.chunks))
    assert work.chunks[: len(wanted)].tolist() == wanted
    assert not work.chunks[len(wanted) :].any()
    assert work.rows_per_chunk == size and work.row_chunks is not None
    for index, record in enumerate(wanted):
        assert (work.row_chunks[record[0] : record[1]] == index).all()
    for name in ("member_rows", "member_columns", "member_scales", "member_ranks"):
        ours, theirs = getattr(work, name).view(torch.int32), getattr(step.work, name)
        assert torch.equal(ours, theirs.view(torch.int32)), name


def make_experts_site(
    slice_starts: tuple[int, ...], features: int, experts: int, dtype: torch.dtype
) -> LoRASite:
    """Each expert has factors of its own; about a third of them lack one adapter in one slice."""
    pools = []
    for _ in range(experts):
        lacking: tuple[tuple[int, int], ...] = ()
        if torch.rand(()) < 0.35:
            lacking = ((int(torch.randint(len(slice_starts) - 1, ())), 9),)
        pools.append(make_site(slice_starts, features, list(RANKS.items()), dtype, lacking))
    site = LoRASite(
        torch.cat([pool.a for pool in pools], 1),
        torch.cat([pool.b for pool in pools]),
        slice_starts,
        torch.cat([pool.row_r for pool in pools], 1),
        torch.cat([pool.row_scale for pool in pools], 1).nan_to_num(),
        experts,
    )
    assert site.a.shape[1] == experts * ROWS
    return site


def dense_delta(site: LoRASite, expert: int, step: Step, token: int) -> torch.Tensor:
    """float64 [N, in]: what the adapters of `token` add to the weight of `expert`."""
    dense = torch.zeros(site.slice_starts[-1], site.a.shape[2], dtype=torch.float64)
    for m in range(*step.compositions[token]):
        p = expert * ROWS + int(step.work.member_rows[m])
        for s in range(site.num_slices):
            lo, hi, r = *site.slice_starts[s : s + 2], int(site.row_r[s, p])
            if r:
                factor = step.work.member_scales[m].double() * site.row_scale[s, p].double()
                up, down = site.b[p : p + r, lo:hi].double(), site.a[s, p : p + r].double()
                dense[lo:hi] += factor * (up.T @ down)
    return dense


@dataclass(frozen=True)
class Layer:
    """The weights of a layer of experts and the factors of the adapters in it."""

    gate_up: torch.Tensor  # [E, 2 I, H]
    down: torch.Tensor  # [E, H, I]
    gate_up_site: LoRASite
    down_site: LoRASite


def make_layer(experts: int, hidden: int, inner: int, dtype: torch.dtype, slices: int) -> Layer:
    starts = (0, 2 * inner) if slices == 1 else (0, inner, 2 * inner)
    return Layer(
        (torch.randn(experts, 2 * inner, hidden) / math.sqrt(hidden)).to(dtype),
        (torch.randn(experts, hidden, inner) / math.sqrt(inner)).to(dtype),
        make_experts_site(starts, hidden, experts, dtype),
        make_experts_site((0, hidden), inner, experts, dtype),
    )


def layer_oracle(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, layer: Layer, step: Step
) -> torch.Tensor:
    """float64 [T, H]: one token and one expert at a time, with the adapters in the weights."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, experts in enumerate(chosen.tolist()):
        for k, e in enumerate(experts):
            gate_up = layer.gate_up[e].double() + dense_delta(layer.gate_up_site, e, step, t)
            down = layer.down[e].double() + dense_delta(layer.down_site, e, step, t)
            gate, up = (gate_up @ x[t].double()).chunk(2)  # [I], [I]
            out[t] += weights[t, k].double() * (down @ (torch.nn.functional.silu(gate) * up))
    return out


def layer_to(layer: Layer, device: str) -> Layer:
    return Layer(
        layer.gate_up.to(device),
        layer.down.to(device),
        site_to(layer.gate_up_site, device),
        site_to(layer.down_site, device),
    )


def routing_to_cpu(routing: Routing) -> Routing:
    work = None if routing.work is None else work_to(routing.work, "cpu")
    return Routing(routing.order.cpu(), routing.places.cpu(), routing.ends.cpu(), work)
