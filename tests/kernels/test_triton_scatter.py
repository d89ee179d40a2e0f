"""The scatter kernel against its twin, on the GPU or in Triton's interpreter.

Random values are such that every type holds them: the interpreter cuts off where a GPU rounds.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from loramux.kernels import LoRASite  # noqa: E402
from loramux.kernels.triton_scatter import (  # noqa: E402
    DTYPES,
    ScatterTable,
    SliceSource,
    scatter,
    scatter_reference,
)

POOL_ROWS = 96
SHAPES = [(40, (33,)), (300, (17, 5, 270)), (7, (1, 64))]  # (in, out of each slice)


def _site(features: int, widths: tuple[int, ...], dtype: torch.dtype, under: bool) -> LoRASite:
    """All of it poisoned: NaN, or numbers that no adapter writes."""
    slices, starts = len(widths), [0]
    for width in widths:
        starts.append(starts[-1] + width)
    if under:
        flat = torch.full((POOL_ROWS, slices, features), torch.nan, dtype=dtype, device=DEVICE)
        a = flat.transpose(0, 1)  # [S, R, in]
    else:
        a = torch.full((slices, POOL_ROWS, features), torch.nan, dtype=dtype, device=DEVICE)
    return LoRASite(
        a=a,
        b=torch.full((POOL_ROWS, starts[-1]), torch.nan, dtype=dtype, device=DEVICE),
        slice_starts=tuple(starts),
        row_r=torch.full((slices, POOL_ROWS), -7, dtype=torch.int32, device=DEVICE),
        row_scale=torch.full((slices, POOL_ROWS), torch.nan, device=DEVICE),
    )


def _copy(site: LoRASite) -> LoRASite:
    copies = {name: getattr(site, name).clone() for name in ("a", "b", "row_r", "row_scale")}
    return LoRASite(slice_starts=site.slice_starts, **copies)


def _adapter(
    sites: list[LoRASite], dtypes: list[torch.dtype], max_r: int, rng: random.Random
) -> tuple[torch.Tensor, dict[tuple[int, int], SliceSource]]:
    """The bytes of a random adapter; some slices get none, some a smaller rank."""
    parts: list[torch.Tensor] = []
    sources: dict[tuple[int, int], SliceSource] = {}

    def append(rows: int, columns: int, dtype: torch.dtype) -> int:
        offset = sum(part.numel() for part in parts)
        values = torch.randint(-127, 128, (rows, columns)) / 64
        flat = values.to(dtype).view(torch.uint8).reshape(-1)  # [bytes]
        parts.append(torch.cat((flat, flat.new_zeros(-flat.numel() % 4))))
        return offset

    for index, site in enumerate(sites):
        for slice_index in range(site.num_slices):
            if (index, slice_index) != (1, 0) and rng.random() < 0.25:
                continue
            r = max_r if slice_index == 0 else rng.randint(1, max_r)
            a_dtype, b_dtype = rng.choice(dtypes), rng.choice(dtypes)
            width = site.slice_starts[slice_index + 1] - site.slice_starts[slice_index]
            a = append(r, site.a.shape[2], a_dtype)
            b = append(width, r, b_dtype)
            scale = rng.uniform(0.1, 4)
            sources[index, slice_index] = SliceSource(a, a_dtype, b, b_dtype, r, scale)
    return torch.cat(parts).to(DEVICE), sources


def _run(
    sites: list[LoRASite],
    buffer: torch.Tensor,
    sources: dict[tuple[int, int], SliceSource],
    first_row: int,
    max_r: int,
) -> None:
    work = ScatterTable(sites).fill(sources, buffer.data_ptr(), first_row, max_r)
    scatter(work, work.table.to(DEVICE))


def _assert_same(got: list[LoRASite], want: list[LoRASite]) -> None:
    for mine, twin in zip(got, want, strict=True):
        for name in ("a", "b", "row_r", "row_scale"):
            left, right = getattr(mine, name), getattr(twin, name)
            assert torch.equal(left.isnan(), right.isnan()), name
            assert torch.equal(left.nan_to_num(), right.nan_to_num()), name


@pytest.mark.parametrize("pool", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [*([d] for d in DTYPES), list(DTYPES)], ids=str)
def test_writes_what_the_twin_writes_and_nothing_else(
    pool: torch.dtype, stored: list[torch.dtype]
) -> None:
    rng = random.Random(f"{pool}{stored}")
    for max_r in (1, 7, 16, 33, 64):
        sites = [_site(*shape, pool, under=i == 1) for i, shape in enumerate(SHAPES)]
        twins = [_copy(site) for site in sites]
        buffer, sources = _adapter(sites, stored, max_r, rng)
        first_row = rng.randint(0, POOL_ROWS - max_r)
        _run(sites, buffer, sources, first_row, max_r)
        scatter_reference(twins, buffer, sources, first_row, max_r)
        _assert_same(sites, twins)


def test_neighbours_keep_their_rows() -> None:
    sites = [_site(*shape, torch.bfloat16, under=True) for shape in SHAPES]
    twins = [_copy(site) for site in sites]
    rng = random.Random(5)
    for first_row, max_r in ((0, 8), (24, 16), (8, 16), (90, 6)):
        buffer, sources = _adapter(sites, [torch.float32], max_r, rng)
        _run(sites, buffer, sources, first_row, max_r)
        scatter_reference(twins, buffer, sources, first_row, max_r)
    _assert_same(sites, twins)
    assert int(sites[1].row_r[0, 24]) == 16 and float(sites[1].a[0, 40:90].isnan().all())


def test_an_empty_table_writes_nothing() -> None:
    sites = [_site(*shape, torch.float16, under=False) for shape in SHAPES]
    twins = [_copy(site) for site in sites]
    _run(sites, torch.empty(8, dtype=torch.uint8, device=DEVICE), {}, 0, 0)
    _assert_same(sites, twins)


@pytest.mark.gpu
@pytest.mark.parametrize("pool", DTYPES, ids=str)
def test_casts_round_as_torch_rounds(pool: torch.dtype) -> None:
    sites = [_site(512, (1024, 300), pool, under=True)]
    twins = [_copy(site) for site in sites]
    values = torch.randn(2, 16 * (512 + 1024), device=DEVICE)
    buffer = values.view(torch.uint8).view(-1)  # [bytes]
    half = 16 * 512 * 4
    sources = {(0, 0): SliceSource(0, torch.float32, half, torch.float32, 16, 0.3)}
    _run(sites, buffer, sources, 3, 16)
    scatter_reference(twins, buffer, sources, 3, 16)
    _assert_same(sites, twins)
