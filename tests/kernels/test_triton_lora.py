"""Shrink and expand in Triton, on the GPU or in the interpreter, against dense float64 weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import DTYPES, assert_close, lora_oracle, poisoned, strided
from work_lists import RANKS, SPANS, TOKENS, expand_to, in_float64, make_case, strided_to

from loramux.kernels import Expand, reference, shrink_parts

triton_delta = pytest.importorskip("loramux.kernels.triton_delta")
triton_lora = pytest.importorskip("loramux.kernels.triton_lora")
triton_shrink = pytest.importorskip("loramux.kernels.triton_shrink")

pytestmark = pytest.mark.usefixtures("_grids")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def expanded(y: torch.Tensor, expand: Expand, device: str) -> torch.Tensor:
    there = strided_to(y, device)
    triton_lora.lora_expand(there, expand_to(expand, device))
    return there.cpu()


def check_expand(y: torch.Tensor, expand: Expand, device: str) -> None:
    wanted = y.double()  # [T, N]
    reference.lora_expand(wanted, in_float64(expand))
    actual = expanded(y, expand, device)
    touched = torch.zeros(len(y), dtype=torch.bool)
    for first, end, *_ in expand.work.chunks[
        int(expand.work.counts[0]) : int(expand.work.counts[1])
    ].tolist():
        touched[first:end] = True
    assert torch.equal(actual[~touched].view(torch.uint8), y[~touched].view(torch.uint8))
    assert_close(actual[touched], wanted[touched], floor=4e-5)


@pytest.mark.parametrize("weights", DTYPES, ids=str)
@pytest.mark.parametrize("activations", DTYPES, ids=str)
def test_expand_of_every_pair_of_dtypes(
    activations: torch.dtype, weights: torch.dtype, device: str
) -> None:
    case = make_case((0, 48, 64, 101), RANKS, SPANS, TOKENS, dtype=weights, untouched=((1, 9),))
    y = strided(TOKENS, 101, dtype=activations)
    y[0], y[44:] = float("nan"), float("nan")
    check_expand(y, case.expand, device)


@pytest.mark.parametrize(
    "starts, parts, rows, h_dtype",
    [
        ((0, 576), 1, 16, BF16),
        ((0, 576), 4, 16, F32),
        ((0, 256, 512), 2, 64, F32),
        ((0, 0, 130, 130), 3, 16, F16),
        ((0, 16), 16, 64, F32),
        ((0, 576), 1, 4, BF16),
        ((0, 256, 384, 512), 4, 4, F32),
        ((0, 0, 130, 130), 3, 4, F16),
    ],
)
def test_expand_of_parts_and_slices(
    starts: tuple[int, ...], parts: int, rows: int, h_dtype: torch.dtype, device: str
) -> None:
    case = make_case(
        starts, RANKS, SPANS, TOKENS, parts=parts, rows_per_chunk=rows, h_dtype=h_dtype,
        under=h_dtype == BF16, untouched=((0, 2), (0, 64)),
    )  # fmt: skip
    check_expand(torch.randn(TOKENS, starts[-1]).bfloat16(), case.expand, device)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("known, at_once", [(0, 16), (16, 16), (24, 32), (64, 64), (256, 64)])
def test_ranks_that_a_tile_takes_at_once(
    known: int, at_once: int, dtype: torch.dtype, device: str
) -> None:
    """As many as there may be, where all tiles run at once; the answer does not depend on it."""
    expand = make_case((0, 256, 512), RANKS, SPANS, TOKENS, rows_per_chunk=8, dtype=dtype).expand
    expand = replace(expand, work=replace(expand.work, max_ranks=known))
    check_expand(torch.randn(TOKENS, 512).to(dtype), expand, device)
    placed = expand_to(expand, device)
    at_once = min(at_once, 32) if dtype == F32 else at_once
    assert triton_delta.tile_arguments(placed, 4)["RANKS"] == at_once
    assert triton_delta.tile_arguments(placed, 4096)["RANKS"] == 16


def test_no_chunks_with_members_and_no_chunks_at_all(device: str) -> None:
    y = torch.randn(8, 32)
    for spans in ([(0, 8, [])], []):
        check_expand(y, make_case((0, 32), RANKS, list(spans), 8).expand, device)


def check_shrink(
    activations: torch.dtype,
    weights: torch.dtype,
    starts: tuple[int, ...],
    features: int,
    parts: int,
    rows: int,
    device: str,
    under: bool = False,
) -> None:
    case = make_case(
        starts, RANKS, SPANS, TOKENS, dtype=weights, features=features, rows_per_chunk=rows,
        under=under, untouched=((len(starts) - 2, 18),), parts=parts,
    )  # fmt: skip
    x = strided(TOKENS, features, dtype=activations)
    for first, end, members in SPANS:
        x[first:end] = x[first:end] if members else float("nan")
    slices, work = len(starts) - 1, expand_to(case.expand, device)
    h = poisoned(parts, TOKENS, case.width * slices, dtype=F32).to(device)
    triton_shrink.lora_shrink(strided_to(x, device), work.site, work.work, h)
    wanted = poisoned(TOKENS, case.width * slices, dtype=torch.float64)
    for first, end, start, stop, *_ in case.work.chunks[: int(case.work.counts[1])].tolist():
        for m in range(start, stop):
            p, column = int(case.work.member_rows[m]), int(case.work.member_columns[m])
            for s in range(slices):
                r = int(case.site.row_r[s, p])
                a = case.site.a[s, p : p + r].double()
                own = slice(column * slices + s, (column + r) * slices, slices)
                wanted[first:end, own] = x[first:end].to(weights).double() @ a.T
    owned = ~wanted.isnan()
    h = h.cpu()
    for part in h:
        assert torch.equal(part.isnan(), ~owned), "owned columns, and no others, are written"
    assert_close(h.sum(0)[owned], wanted[owned], floor=1e-5)


@pytest.mark.parametrize(
    "activations, weights", [(BF16, BF16), (F16, F16), (F32, F32), (BF16, F32), (F32, BF16)]
)
def test_shrink_of_dtypes(activations: torch.dtype, weights: torch.dtype, device: str) -> None:
    check_shrink(activations, weights, (0, 5, 9), 150, 2, 16, device)


@pytest.mark.parametrize(
    "starts, features, parts, rows, under",
    [
        ((0, 8), 576, 1, 16, False),
        ((0, 8), 576, 3, 64, True),
        ((0, 8), 1, 4, 16, False),  # more parts than there is work for
        ((0, 3, 5, 8), 300, 8, 16, True),
        ((0, 3, 5, 8), 128, 1, 64, True),
        ((0, 3, 8), 200, 1, 64, False),
        ((0, 3, 5, 8), 128, 2, 4, True),
    ],
)
def test_shrink_of_sizes(
    starts: tuple[int, ...], features: int, parts: int, rows: int, under: bool, device: str
) -> None:
    check_shrink(BF16, BF16, starts, features, parts, rows, device, under)


def test_shrink_then_expand_is_the_delta(device: str) -> None:
    case = make_case((0, 40, 72), RANKS, SPANS, TOKENS, dtype=F32, features=96, parts=2)
    x, y = torch.randn(TOKENS, 96), torch.randn(TOKENS, 72)
    wanted = lora_oracle(y, x, case.site, case.segments)
    there = expand_to(case.expand, device)
    h = poisoned(2, TOKENS, case.width * 2, dtype=F32).to(device)
    triton_shrink.lora_shrink(x.to(device), there.site, there.work, h)
    out = expanded(y, Expand(case.site, h.cpu(), case.work), device)
    assert_close(out, wanted, floor=2e-4)


def test_an_input_is_read_once_for_many_ranks() -> None:
    """Where no captured graph has the columns of adapters that are not in the step."""
    once = triton_shrink.ranks_at_once
    assert [once(64, columns, 1, 1) for columns in (8, 16, 24, 64, 500)] == [16, 16, 32, 64, 128]
    assert [once(64, 64, spread, 1) for spread in (2, 4, 8, 16)] == [64, 32, 16, 16]
    assert once(16, 64, 1, 1) == once(64, 64, 1, 8) == 16


def test_parts_of_a_shrink() -> None:
    assert shrink_parts(1, 4096, 1) == 8
    assert shrink_parts(64, 14336, 32) == 16
    assert shrink_parts(64, 300, 32) == 1
    assert shrink_parts(8192, 4096, 128) == 1


def test_many_items_that_may_not_be_there_have_no_program_each() -> None:
    """A routing of large chunks has room for many more than there are."""
    expand = make_case((0, 64), RANKS, SPANS, TOKENS, rows_per_chunk=64).expand
    assert triton_lora.tile_programs(expand, 3) == (expand.work.max_chunks * 3,)
    loose = replace(expand, work=replace(expand.work, max_chunks=30_000))
    assert triton_lora.tile_programs(loose, 3) == triton_delta.programs(90_000, expand.h.device)
