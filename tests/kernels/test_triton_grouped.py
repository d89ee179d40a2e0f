"""Rows times their experts' weights in Triton, on the GPU or in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, NAN, assert_close, int32, strided
from work_lists import strided_to

from loramux.kernels import reference

grouped = pytest.importorskip("loramux.kernels.triton_grouped")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TILES = [grouped.FEW, grouped.SOME, grouped.MANY, grouped.WIDE_FEW, grouped.WIDE_MANY]


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def split(rows: int, experts: int, among: int = 0) -> torch.Tensor:
    """[E] int32: random ends; with `among`, only so many experts have rows."""
    few = torch.randperm(experts)[: among or experts]
    chosen = few[torch.randint(len(few), (rows,))]
    return torch.bincount(chosen, minlength=experts).cumsum(0).int()


def oracle(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """float64 [S, out], row by row."""
    rows = []
    for row in range(len(x)):
        expert = sum(end <= row for end in ends.tolist())
        rows.append(weight[expert].double() @ x[row].double())
    return torch.stack(rows)


def make(
    rows: int, experts: int, size: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [S, in] and weight [E, out, in], both between NaN."""
    x = strided(rows, size, dtype=dtype)
    return x, (strided(experts, width, size, dtype=F32) / size**0.5).to(dtype)


@pytest.mark.parametrize(
    "rows, experts, among, size, width",
    [
        (1, 1, 0, 5, 3),
        (8, 64, 0, 72, 24),  # fewer rows than experts: a tile for each row
        (40, 4, 1, 64, 72),  # all to one expert
        (150, 8, 5, 100, 16),
        (70, 5, 2, 128, 130),
        (33, 33, 0, 16, 16),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_rows(
    dtype: torch.dtype, rows: int, experts: int, among: int, size: int, width: int, device: str
) -> None:
    (x, weight), ends = make(rows, experts, size, width, dtype), split(rows, experts, among)
    wanted = oracle(x, weight, ends)
    there = (strided_to(x, device), weight.to(device), ends.to(device))
    for ours in (grouped.grouped_tiles(*there), grouped.grouped_linear(*there)):
        assert ours.dtype == dtype and ours.is_contiguous()
        assert_close(ours.cpu(), wanted, floor=2e-5)
    assert_close(reference.grouped_linear(x, weight, ends), wanted, floor=2e-5)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_tile(tile: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    if dtype == F32 and tile in TILES[:3] and device == "cuda":
        pytest.skip("these tiles of float32 do not fit a GPU's shared memory")
    (x, weight), ends = make(300, 6, 192, 140, dtype), split(300, 6, 4)
    out = grouped.grouped_tiles(
        *(strided_to(x, device), weight.to(device), ends.to(device)),
        tile=grouped.GroupedTile(*tile),
    )
    assert_close(out.cpu(), oracle(x, weight, ends), floor=2e-5)


def test_a_transposed_weight_and_an_input_with_steps(device: str) -> None:
    (x, weight), ends = make(30, 4, 48, 40, BF16), split(30, 4)
    wanted = oracle(x, weight, ends)
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((30, 96), NAN, dtype=BF16)
    wide[:, ::2] = x
    out = grouped.grouped_linear(wide.to(device)[:, ::2], turned.to(device), ends.to(device))
    assert_close(out.cpu(), wanted, floor=2e-5)


def test_the_tiles_of_experts_whose_rows_fill_them_exactly(device: str) -> None:
    """And of one row more, at the start, in the middle and at the end."""
    for counts in ([16, 16, 32], [0, 17, 15, 0], [1, 16, 0, 16], [48]):
        ends = int32(counts).cumsum(0).int()
        x, weight = make(sum(counts), len(counts), 32, 16, F16)
        there = (strided_to(x, device), weight.to(device), ends.to(device))
        assert_close(
            grouped.grouped_tiles(*there, tile=grouped.FEW).cpu(),
            oracle(x, weight, ends),
            floor=2e-5,
        )


def test_no_rows(device: str) -> None:
    x, weight = torch.randn(0, 16, device=device), torch.randn(3, 8, 16, device=device)
    assert grouped.grouped_linear(x, weight, int32([0, 0, 0]).to(device)).shape == (0, 8)


def test_tiles_by_rows_an_expert() -> None:
    assert grouped.tile_for(8, 128, BF16) == grouped.FEW  # one token: a row an expert
    assert grouped.tile_for(1024, 64, BF16) == grouped.FEW
    assert grouped.tile_for(1100, 64, F16) == grouped.SOME
    assert grouped.tile_for(65536, 64, BF16) == grouped.MANY
    assert grouped.tile_for(8, 128, F32) == grouped.WIDE_FEW
    assert grouped.tile_for(65536, 64, F32) == grouped.WIDE_MANY


@pytest.mark.parametrize("turned", [False, True])
def test_torchs_kernel(turned: bool, device: str) -> None:
    x, ends = torch.randn(50, 64).to(BF16), split(50, 6, 4)
    weight = (torch.randn(6, 40, 64) / 8).to(BF16)
    wanted = oracle(x, weight, ends)
    there = weight.to(device)
    if turned:
        there = there.transpose(1, 2).contiguous().transpose(1, 2)
    out = grouped.grouped_mm(x.to(device), there, ends.to(device))
    assert out.is_contiguous()
    assert_close(out.cpu(), wanted, floor=2e-5)


def test_what_torchs_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(6, 64).to(BF16), torch.randn(4, 40, 64).to(BF16)
    takes = grouped.is_for_grouped_mm
    assert not takes(x, weight)  # not on a CPU
    monkeypatch.setattr(grouped, "_has_grouped_mm", lambda device: True)
    assert takes(x, weight)
    assert takes(torch.randn(6, 80).to(BF16)[:, 8:72], weight)
    assert takes(x, weight.transpose(1, 2).contiguous().transpose(1, 2))
    assert not takes(x.half(), weight.half())
    assert not takes(x[:0], weight)
    assert not takes(torch.randn(6, 80).to(BF16)[:, 4:68], weight)  # rows begin between 16 bytes
    assert not takes(torch.randn(6, 68).to(BF16)[:, :64], weight)
    assert not takes(x, weight[:, :36])  # its result would have gaps
    assert not takes(x, torch.randn(4, 40, 68).to(BF16)[:, :, :64])
    assert not takes(torch.randn(6, 128).to(BF16)[:, ::2], weight)


def test_torchs_kernel_is_taken_where_it_can(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    many = 4 * grouped.MOST_TILED + 1
    x, weight = torch.randn(many, 64).to(BF16), torch.randn(4, 40, 64).to(BF16)
    monkeypatch.setattr(grouped, "_has_grouped_mm", lambda device: True)
    monkeypatch.setattr(grouped, "grouped_mm", lambda *given: given)
    ends = split(many, 4)
    assert grouped.grouped_linear(x, weight, ends) == (x, weight, ends)
    there = (x[:6].to(device), weight.to(device), split(6, 4).to(device))
    few = grouped.grouped_linear(*there)  # in tiles
    assert isinstance(few, torch.Tensor)
