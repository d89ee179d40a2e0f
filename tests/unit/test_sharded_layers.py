"""With `fully_sharded_loras` layers whose A and B are on several ranks compute what whole ones do."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from loramux.kernels import Expand, LoRASite, WorkList, lora_expand
from loramux.layers.batch import LoRAStep, StepBatch
from loramux.layers.sharded import ShardedLinear, deal_out, parted
from loramux.parallel import Group, cut_linear
from rank_threads import on_all_ranks

SIZE, RANK, SCALE = 2, 5, 0.75
TOKENS, PLAIN, HIDDEN = 9, 2, 16
OUTS = {"colwise": (8, 12), "rowwise": (12,)}


@dataclass
class _Case:
    """Layers with one input under `style`, an adapter on them, and what a rank makes of x."""

    style: str
    linears: list[nn.Linear]
    a: list[torch.Tensor]  # of each layer [r, in]
    b: list[torch.Tensor]  # [out, r]
    x: torch.Tensor  # [T, in]
    under: bool  # A stands under the weight, and its product comes with the base product

    def expected(self) -> torch.Tensor:
        """[T, N] of all layers side by side."""
        wanted = []
        for linear, a, b in zip(self.linears, self.a, self.b, strict=True):
            y = linear(self.x)  # [T, out]
            y[PLAIN:] += SCALE * (self.x[PLAIN:] @ a.T @ b.T)
            wanted.append(y)
        return torch.cat(wanted, dim=1)

    def layer(self, group: Group) -> ShardedLinear:
        """This rank's part."""
        work = _work()
        batch = StepBatch(
            lora=LoRAStep(
                *(work, 16 if self.under else 0),
                width=6,
                dealt=deal_out(work, SIZE),
                deltas=parted(work)[0],
            )
        )
        cuts, parts = [], []
        for whole in self.linears:
            shape = (whole.out_features, whole.in_features)
            cut = cut_linear(self.style, shape, SIZE, group.rank, fully=True)
            part = nn.Linear(cut.input.size, cut.output.size, dtype=torch.float64)
            part.weight.data = whole.weight.data[cut.output.slice, cut.input.slice].clone()
            part.bias.data = whole.bias.data[cut.output.slice].clone()
            if cut.kind == "row" and group.rank > 0:
                part.bias = None  # type: ignore[assignment]
            cuts.append(cut)
            parts.append(part)
        layer = ShardedLinear(parts, batch, cuts, group, fully=True)
        layer.attach_site(RANK, torch.float64, under_weight=self.under)
        assert layer.site is not None and layer.dealt_site is not None
        assert layer.extends_product == self.under
        for s, (cut, a, b) in enumerate(zip(cuts, self.a, self.b, strict=True)):
            start = layer.starts[s]
            mine = b[cut.b_output.slice].T  # [r, out']
            layer.site.b[:RANK, start : start + mine.shape[1]] = mine
            own = a[group.rank :: SIZE] if cut.deal > 1 else a[:, cut.input.slice]  # [r', in']
            (layer.dealt_site if cut.deal > 1 else layer.site).a[s, : len(own)] = own
            _own(layer.site, s, RANK)
            _own(layer.dealt_site, s, len(own) if cut.deal > 1 else 0)
        return layer

    def outcome(self, group: Group) -> torch.Tensor:
        """y [T, N'] of this rank."""
        layer = self.layer(group)
        part = layer.cuts[0].input.slice
        y, expand = layer.project(self.x[:, part].contiguous())
        if expand is not None:
            lora_expand(y, expand)
        return y


def _own(site: LoRASite, s: int, r: int) -> None:
    site.row_r[s, 0], site.row_scale[s, 0] = r, SCALE


def _work() -> WorkList:
    """An adapter on all rows but the first ones."""
    one = struct.unpack("<i", struct.pack("<f", 1.0))[0]
    plain, adapted = [0, PLAIN, 0, 0, 0, 0, 0, 0], [PLAIN, TOKENS, 0, 1, 0, 0, one, RANK]
    return WorkList(
        chunks=torch.tensor([plain, adapted], dtype=torch.int32),
        counts=torch.tensor([1, 2], dtype=torch.int32),
        member_rows=torch.zeros(1, dtype=torch.int32),
        member_columns=torch.zeros(1, dtype=torch.int32),
        member_scales=torch.ones(1),
        member_ranks=torch.tensor([RANK], dtype=torch.int32),
        rows_per_chunk=16,
        max_chunks=2,
    )


@pytest.mark.parametrize("at_once", [False, True], ids=["apart", "at once"])
def test_a_fully_sharded_row_layer_is_summed_with_its_delta_or_behind_it(
    at_once: bool, tmp_path: Path
) -> None:
    linear = nn.Linear(HIDDEN, OUTS["rowwise"][0], dtype=torch.float64)
    a = torch.randn(RANK, HIDDEN, dtype=torch.float64)
    b = torch.randn(linear.out_features, RANK, dtype=torch.float64)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    case = _Case("rowwise", [linear], [a], [b], x, True)

    def outcome(group: Group) -> torch.Tensor:
        twin = _TwinExchange(group)
        group.exchange = twin if at_once else None  # type: ignore[assignment]
        y = case.outcome(group)
        assert twin.calls == at_once
        return y

    outcomes = on_all_ranks(SIZE, tmp_path / "store", outcome)
    with torch.inference_mode():
        torch.testing.assert_close(_joined("rowwise", outcomes), case.expected())


@pytest.mark.parametrize("under", [False, True], ids=["kernel", "product"])
@pytest.mark.parametrize("style", ["colwise", "rowwise"])
def test_ranks_have_together_what_a_whole_layer_computes(
    style: str, under: bool, tmp_path: Path
) -> None:
    linears = [nn.Linear(HIDDEN, out, dtype=torch.float64) for out in OUTS[style]]
    a = [torch.randn(RANK, HIDDEN, dtype=torch.float64) for _ in linears]
    b = [torch.randn(one.out_features, RANK, dtype=torch.float64) for one in linears]
    case = _Case(style, linears, a, b, torch.randn(TOKENS, HIDDEN, dtype=torch.float64), under)
    outcomes = on_all_ranks(SIZE, tmp_path / "store", case.outcome)
    with torch.inference_mode():
        torch.testing.assert_close(_joined(style, outcomes), case.expected())


def _joined(style: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """What the ranks have together [T, N]."""
    if style == "rowwise":
        assert torch.equal(*parts)
        return parts[0]
    slices, start = [], 0
    for out in OUTS[style]:
        end = start + out // SIZE
        slices += [part[:, start:end] for part in parts]
        start = end
    return torch.cat(slices, dim=1)


class _TwinExchange:
    """Sums over gloo, and expands by the twin."""

    def __init__(self, group: Group):
        self._group = group
        self.calls = 0

    def takes(self, parts: torch.Tensor, *, sums: bool) -> bool:
        return False

    def takes_delta(self, z: torch.Tensor, columns: int, site: LoRASite, work: WorkList) -> bool:
        return True

    def sum_and_expand(
        self, z: torch.Tensor, columns: int, site: LoRASite, work: WorkList
    ) -> torch.Tensor:
        self.calls += 1
        z = self._group.all_reduce(z)
        share = site.slice_starts[-1]
        start = 0 if share == columns else self._group.rank * share
        delta = torch.zeros_like(z[:, :columns])  # [T, N]
        h = z[:, columns:].unsqueeze(0)  # [1, T, W]
        lora_expand(delta[:, start : start + share], Expand(site, h, work))
        return z[:, :columns] + (delta if share == columns else self._group.all_reduce(delta))


@pytest.mark.parametrize("at_once", [True, False])
def test_a_row_layer_is_summed_with_its_delta_or_before_it(at_once: bool, tmp_path: Path) -> None:
    linear = nn.Linear(HIDDEN, 32, dtype=torch.float64)
    a = torch.randn(RANK, HIDDEN, dtype=torch.float64)
    b = torch.randn(32, RANK, dtype=torch.float64)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    case = _Case("rowwise", [linear], [a], [b], x, False)

    def outcome(group: Group) -> torch.Tensor:
        cut = cut_linear("rowwise", (32, HIDDEN), SIZE, group.rank, fully=False)
        part = nn.Linear(cut.input.size, 32, bias=group.rank == 0, dtype=torch.float64)
        part.weight.data = linear.weight.data[:, cut.input.slice].clone()
        if group.rank == 0:
            part.bias = linear.bias
        batch = StepBatch(lora=LoRAStep(_work(), 0, width=6))
        layer = ShardedLinear([part], batch, [cut], group, fully=False)
        layer.attach_site(RANK, torch.float64)
        assert layer.site is not None
        layer.site.a[0, :RANK], layer.site.b[:RANK] = a[:, cut.input.slice], b.T
        _own(layer.site, 0, RANK)
        twin = _TwinExchange(group)
        group.exchange = twin if at_once else None  # type: ignore[assignment]
        y, expand = layer.project(x[:, cut.input.slice].contiguous())
        assert (expand is None) == at_once == bool(twin.calls)
        if expand is not None:
            lora_expand(y, expand)
        return y

    outcomes = on_all_ranks(SIZE, tmp_path / "store", outcome)
    with torch.inference_mode():
        torch.testing.assert_close(_joined("rowwise", outcomes), case.expected())
