"""Chunks of an expert, whose members stand elsewhere than the lists say, in all that walk members.

What is right is said by work lists in which every chunk has a list of its own.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import STEP, assert_close, poisoned, strided
from work_lists import (
    Case,
    Span,
    expand_to,
    in_float64,
    make_case,
    moved,
    strided_to,
    with_own_members,
)

from loramux.kernels import Expand, reference

triton_lora = pytest.importorskip("loramux.kernels.triton_lora")
triton_shrink = pytest.importorskip("loramux.kernels.triton_shrink")
triton_fused = pytest.importorskip("loramux.kernels.triton_fused")

pytestmark = pytest.mark.usefixtures("_grids")

BF16 = torch.bfloat16
RANKS = [(2, 1), (5, 3), (9, 8), (18, 16), (36, 24)]
SPANS: list[Span] = [
    (0, 2, []),
    (2, 9, [5, 18]),
    (9, 29, [36, 2, 9]),
    (29, 30, [9]),
    (30, 34, [18, 36]),
    (34, 36, []),
]
TOKENS = 36


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def make(starts: tuple[int, ...], rows: int, features: int = 1, parts: int = 1) -> Case:
    case = moved(
        make_case(starts, RANKS, SPANS, TOKENS, rows_per_chunk=rows, features=features, parts=parts)
    )
    chunks = case.work.chunks[: int(case.work.counts[1])]
    several = chunks[:, 3] - chunks[:, 2] > 1
    far = chunks[:, 4] >= case.site.a.shape[1] // 2
    assert (several & far).any() and (several & ~far).any()
    return case


def own_members(case: Case) -> Expand:
    return Expand(case.site, case.expand.h, with_own_members(case.work))


@pytest.mark.parametrize("rows", [8, 16, 64])
@pytest.mark.parametrize("starts", [(0, 32, 64), (0, 20, 51)], ids=["tiles", "anywhere"])
def test_expand(starts: tuple[int, ...], rows: int, device: str) -> None:
    case = make(starts, rows)
    y = strided(TOKENS, starts[-1], dtype=BF16)
    wanted = y.double()  # [T, N]
    reference.lora_expand(wanted, in_float64(own_members(case)))
    there = strided_to(y, device)
    triton_lora.lora_expand(there, expand_to(case.expand, device))
    assert_close(there.cpu(), wanted, floor=4e-5)
    twin = y.double()  # [T, N]
    reference.lora_expand(twin, in_float64(case.expand))
    assert torch.equal(twin, wanted)


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("starts", [(0, 32, 64), (0, 64), (0, 21, 42)])
def test_gated(starts: tuple[int, ...], rows: int, device: str) -> None:
    case = make(starts, rows)
    x = strided(TOKENS, starts[-1], dtype=BF16)
    out = triton_fused.gated(strided_to(x, device), "silu", expand_to(case.expand, device))
    wanted = reference.gated(x.double(), "silu", in_float64(own_members(case)))
    assert_close(out.cpu(), wanted, 6.0, floor=40 * STEP[BF16] + 2e-4)


@pytest.mark.parametrize("rows", [8, 64])
def test_shrink(rows: int, device: str) -> None:
    case = make((0, 3, 7), rows, features=40, parts=2)
    x = strided(TOKENS, 40, dtype=BF16)
    shape = (2, TOKENS, case.width * 2)
    there, h = expand_to(case.expand, device), poisoned(*shape, dtype=torch.float32).to(device)
    triton_shrink.lora_shrink(strided_to(x, device), there.site, there.work, h)
    wide = in_float64(own_members(case))
    wanted = poisoned(*shape, dtype=torch.float64)
    reference.lora_shrink(x.double(), wide.site, wide.work, wanted)
    assert torch.equal(h.isnan().cpu(), wanted.isnan())
    assert_close(h.cpu().nan_to_num().sum(0), wanted.nan_to_num().sum(0), floor=1e-5)
    twin = poisoned(*shape, dtype=torch.float64)
    reference.lora_shrink(x.double(), wide.site, case.work, twin)
    assert torch.equal(twin.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_rows_without_members_between_others_keep_their_bits(device: str) -> None:
    case = make_case((0, 20, 51), RANKS, [(0, 4, [9]), (4, 8, []), (8, 12, [2, 5])], 12)
    order, (_, used) = [1, 0, 2], case.work.counts.tolist()
    assert used == len(order) and case.work.chunks[0, 2] == case.work.chunks[0, 3]
    case.work.chunks[:used] = case.work.chunks[order]
    case.work.counts[0] = 0
    y = torch.randn(12, 51).bfloat16()
    y[4:8] = float("nan")
    there = strided_to(y, device)
    triton_lora.lora_expand(there, expand_to(case.expand, device))
    assert torch.equal(there.cpu()[4:8].view(torch.int16), y[4:8].view(torch.int16))
    assert not there.isnan()[:4].any() and not there.isnan()[8:].any()
