"""Rows to their experts and back, and a whole layer of experts with LoRA, against float64.

The kernels run in Triton, on the GPU or in the interpreter; the layer also by the twins.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from expert_cases import (
    ROWS,
    WIDTH,
    Layer,
    Step,
    choose,
    layer_oracle,
    layer_to,
    make_experts_site,
    make_layer,
    make_step,
)
from kernel_cases import DTYPES, assert_close, strided
from work_lists import site_to, strided_to, work_to

from loramux.kernels import Expand, WorkList, reference

cuda = pytest.importorskip("loramux.kernels.cuda")
from loramux.kernels.triton_grouped import (  # noqa: E402
    FEW,
    MANY,
    MOST_FOLDED,
    SOME,
    GroupedTile,
    grouped_linear,
    grouped_tiles,
)

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

F32, BF16 = torch.float32, torch.bfloat16
STEP_TENSORS = (
    "chunks", "counts", "member_rows", "member_columns", "member_scales", "member_ranks",
)  # fmt: skip


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("size", [1, 72, 1500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_take_rows(dtype: torch.dtype, size: int, device: str) -> None:
    x, order = strided(7, size, dtype=dtype), torch.randperm(21).int()
    wanted = x[order.long() // 3]
    out = cuda.take_rows(strided_to(x, device), order.to(device), 3)
    assert out.is_contiguous() and torch.equal(out.cpu(), wanted)
    assert torch.equal(reference.take_rows(x, order, 3), wanted)
    turned = x.t().contiguous().t().to(device)
    assert torch.equal(cuda.take_rows(turned, order.to(device), 3).cpu(), wanted)


@pytest.mark.parametrize("top_k, size", [(1, 72), (3, 1500), (8, 5)])
@pytest.mark.parametrize("same", [False, True], ids=["float32-weights", "own-weights"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine(dtype: torch.dtype, same: bool, top_k: int, size: int, device: str) -> None:
    tokens = 5
    y, places = strided(tokens * top_k, size, dtype=dtype), torch.randperm(tokens * top_k).int()
    weights = torch.rand(tokens, top_k + 2).to(dtype if same else F32)[:, 1:-1]
    rows = y.double()[places.long()].view(tokens, top_k, size)
    wanted = (rows * weights.double()[..., None]).sum(1)
    out = cuda.combine(strided_to(y, device), places.to(device), weights.to(device))
    for ours in (out.cpu(), reference.combine(y, places, weights)):
        assert ours.dtype == dtype and ours.is_contiguous()
        assert_close(ours, wanted, floor=4e-6)


def test_combine_of_float64() -> None:
    y, places, weights = torch.randn(6, 4).double(), torch.randperm(6), torch.rand(3, 2).double()
    wanted = torch.einsum("tk,tkh->th", weights, y[places].view(3, 2, 4))
    assert (reference.combine(y, places, weights) - wanted).abs().max() < 1e-14


def run_layer(
    ops: Any,
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    layer: Layer,
    work: WorkList | None,
    parts: int = 2,
) -> torch.Tensor:
    """The layer as it is made of the ops -> [T, H]."""
    top_k = chosen.shape[1]
    routing = ops.route(chosen, len(layer.gate_up), work, ROWS)
    rows = ops.take_rows(x, routing.order, top_k)

    def shrink(x: torch.Tensor, site: Any, *order: Any) -> Expand:
        shape = (parts, len(rows), WIDTH * site.num_slices)
        h = torch.full(shape, math.nan, dtype=F32, device=x.device)
        ops.lora_shrink(x, site, routing.work, h, *order)
        return Expand(site, h, routing.work)

    expand = None if work is None else shrink(x, layer.gate_up_site, routing.order, top_k)
    gate_up = ops.grouped_linear(rows, layer.gate_up, routing.ends)
    rows = ops.gated(gate_up, "silu", expand)
    expand = None if work is None else shrink(rows, layer.down_site)
    y = ops.grouped_linear(rows, layer.down, routing.ends, expand)
    return ops.combine(y, routing.places, weights)


def check_layer(
    out: torch.Tensor,
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    layer: Layer,
    step: Step,
) -> None:
    wanted = layer_oracle(x, chosen, weights, layer, step)
    if out.dtype == F32:
        assert_close(out, wanted, floor=1e-4)
    else:  # each intermediate result is rounded: no bound an element, but one a row
        error = (out.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert out.dtype == x.dtype and error.max() < 0.03


LAYERS = pytest.mark.parametrize(
    "dtype, tokens, top_k, experts, among, inner, slices",
    [
        (F32, 20, 2, 6, 3, 32, 2),
        (F32, 41, 1, 4, 1, 20, 2),  # all to one expert; slices cut anywhere
        (F32, 9, 4, 4, 0, 24, 1),
        (F32, 1, 4, 16, 0, 32, 2),
        (BF16, 24, 8, 12, 0, 32, 2),
        (BF16, 33, 2, 64, 0, 16, 1),
    ],
)


def check_random_layer(
    ops: Any,
    dtype: torch.dtype,
    tokens: int,
    top_k: int,
    experts: int,
    among: int,
    inner: int,
    slices: int,
    device: str,
) -> None:
    layer, step = make_layer(experts, 40, inner, dtype, slices), make_step(tokens)
    x, chosen = torch.randn(tokens, 40).to(dtype), choose(tokens, top_k, experts, among)
    weights = torch.rand(tokens, top_k)
    there = (x.to(device), chosen.to(device), weights.to(device), layer_to(layer, device))
    out = run_layer(ops, *there, work_to(step.work, device))
    check_layer(out.cpu(), x, chosen, weights, layer, step)


@LAYERS
@pytest.mark.usefixtures("_grids")
def test_layer(
    dtype: torch.dtype,
    tokens: int,
    top_k: int,
    experts: int,
    among: int,
    inner: int,
    slices: int,
    device: str,
) -> None:
    check_random_layer(cuda, dtype, tokens, top_k, experts, among, inner, slices, device)


@LAYERS
def test_layer_of_twins(
    dtype: torch.dtype,
    tokens: int,
    top_k: int,
    experts: int,
    among: int,
    inner: int,
    slices: int,
    device: str,
) -> None:
    check_random_layer(reference, dtype, tokens, top_k, experts, among, inner, slices, device)


def test_layer_without_adapters(device: str) -> None:
    layer, step = make_layer(5, 24, 16, F32, 2), make_step(6)
    step = Step([(0, 0)] * 6, step.work)
    x, chosen, weights = torch.randn(6, 24), choose(6, 2, 5), torch.rand(6, 2)
    there = (x.to(device), chosen.to(device), weights.to(device), layer_to(layer, device))
    check_layer(run_layer(cuda, *there, None).cpu(), x, chosen, weights, layer, step)


def test_layer_of_large_chunks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a long prompt has them, without its 4096 pairs."""
    monkeypatch.setattr("loramux.kernels.reference_experts.FEW_PAIRS", 100)
    monkeypatch.setattr("loramux.kernels.triton_route.FEW_PAIRS", 100)
    layer, step = make_layer(3, 24, 32, F32, 2), make_step(150, rows_per_chunk=64)
    x, chosen, weights = torch.randn(150, 24), choose(150, 2, 3), torch.rand(150, 2)
    there = (x.to(device), chosen.to(device), weights.to(device), layer_to(layer, device))
    out = run_layer(cuda, *there, work_to(step.work, device), parts=1)
    check_layer(out.cpu(), x, chosen, weights, layer, step)


TILES = [FEW, SOME, MANY, GroupedTile(16, 32, 64, 4, 3)]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_products_take_the_deltas_along(tile: GroupedTile, dtype: torch.dtype, device: str) -> None:
    """Where a tile has rows of several compositions, of one, and of none."""
    if dtype == F32 and tile in TILES[:3] and device == "cuda":
        pytest.skip("these tiles of float32 do not fit a GPU's shared memory")
    experts, parts = 4, 2
    step, chosen = make_step(90), choose(90, 2, experts)
    site = make_experts_site((0, 72), 16, experts, dtype)
    routing = reference.route(chosen, experts, step.work, ROWS)
    assert routing.work is not None
    rows = len(routing.order)
    x, weight = torch.randn(rows, 48).to(dtype), torch.randn(experts, 72, 48).to(dtype) / 7
    h = torch.randn(parts, rows, WIDTH) / 4
    wide = [tensor.double() for tensor in (x, weight)]
    site64 = replace(site, a=site.a.double(), b=site.b.double(), affine=site.affine.double())
    h64 = h.sum(0, keepdim=True).to(dtype).double()
    wanted = reference.grouped_linear(
        *(wide[0], wide[1], routing.ends, Expand(site64, h64, routing.work))
    )
    expand = Expand(site_to(site, device), h.to(device), work_to(routing.work, device))
    out = grouped_tiles(
        *(strided_to(x, device), weight.to(device), routing.ends.to(device), expand), tile=tile
    )
    assert_close(out.cpu(), wanted, floor=1e-4)


@pytest.mark.parametrize("tokens", [MOST_FOLDED // 2 - 7, MOST_FOLDED // 2 + 9])
def test_products_add_deltas_themselves_or_behind(tokens: int, device: str) -> None:
    step, chosen = make_step(tokens), choose(tokens, 2, 4)
    site = make_experts_site((0, 72), 16, 4, F32)
    routing = reference.route(chosen, 4, step.work, ROWS)
    rows = len(routing.order)
    assert (rows <= MOST_FOLDED) == (tokens <= MOST_FOLDED // 2)
    x, weight = torch.randn(rows, 48), torch.randn(4, 72, 48) / 7
    h = torch.randn(2, rows, WIDTH) / 4
    assert routing.work is not None
    wanted = reference.grouped_linear(x, weight, routing.ends, Expand(site, h, routing.work))
    expand = Expand(site_to(site, device), h.to(device), work_to(routing.work, device))
    out = grouped_linear(x.to(device), weight.to(device), routing.ends.to(device), expand)
    assert_close(out.cpu(), wanted.double(), floor=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, dtype", [(24, F32), (24, BF16), (2100, BF16)])
def test_a_captured_layer_is_right_for_every_step(tokens: int, dtype: torch.dtype) -> None:
    """Nothing is asked of the device, and no size depends on what it holds."""
    layer, steps = make_layer(8, 64, 32, dtype, 2), [make_step(tokens) for _ in range(3)]
    longest = max(steps, key=lambda step: step.work.max_chunks).work
    members = max(len(step.work.member_rows) for step in steps)
    xs = [torch.randn(tokens, 64).to(dtype) for _ in steps]
    choices = [choose(tokens, 2, 8, among) for among in (0, 2, 5)]
    weights = torch.rand(tokens, 2)
    work = WorkList(
        torch.zeros((longest.max_chunks + 1, 8), dtype=torch.int32, device="cuda"),
        torch.zeros(2, dtype=torch.int32, device="cuda"),
        *(torch.zeros(members, dtype=torch.int32, device="cuda") for _ in range(2)),
        torch.zeros(members, device="cuda"),
        torch.zeros(members, dtype=torch.int32, device="cuda"),
        longest.rows_per_chunk,
        longest.max_chunks,
    )
    x, chosen, there = xs[0].cuda(), choices[0].cuda(), layer_to(layer, "cuda")
    arguments = (cuda, x, chosen, weights.cuda(), there, work)
    run_layer(*arguments)  # compiled
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_layer(*arguments)
    for step, own_x, own_choice in zip(steps, xs, choices, strict=True):
        x.copy_(own_x)
        chosen.copy_(own_choice)
        for name in STEP_TENSORS:
            values, field = getattr(step.work, name), getattr(work, name)
            field.zero_()[: len(values)] = values[: len(field)].to(field.device)
        graph.replay()
        kept = slice(tokens - 60, None)  # enough of them, the rows of no chunk among them
        mine = Step(step.compositions[kept], step.work)
        check_layer(out[kept].cpu(), own_x[kept], own_choice[kept], weights[kept], layer, mine)
