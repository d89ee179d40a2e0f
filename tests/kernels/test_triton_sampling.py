"""The sampling kernels, interpreted where there is no GPU, against sorted lists and frequencies."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

import triton
import triton.language as tl

import loramux.kernels.triton_sampling as kernels
from loramux.kernels.triton_sampling import LAST, THRESHOLD, Draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRAWS = 20000 if DEVICE == "cuda" else 2000  # interpreted, each takes some milliseconds


def _draw(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    logits = logits.to(DEVICE)  # [N, V]
    tokens = torch.zeros(len(draws), dtype=torch.long, device=DEVICE)  # [B]
    for draw in draws:
        tokens[draw.target] = logits[draw.source].argmax()
    settings = torch.from_numpy(kernels.pack(draws, logits.shape[1])).to(DEVICE)  # [C, D]
    kernels.draw(logits, settings, tokens, any(draw.cuts for draw in draws))
    return tokens.tolist()


def _one(**settings: Any) -> Draw:
    return Draw(
        **{"source": 0, "target": 0, "seed": 0, "position": 0, "temperature": 1, **settings}
    )


def _allowed(logits: torch.Tensor, draw: Draw) -> list[int]:
    """What the kernel lets one row [V] draw, by the threshold that it wrote."""
    rows = logits.unsqueeze(0).to(DEVICE)  # [1, V]
    settings = torch.from_numpy(kernels.pack([draw], len(logits))).to(DEVICE)  # [C, 1]
    kernels.cut(rows, settings, rows.argmax(-1))
    threshold, last = (int(settings[c.value, 0]) for c in (THRESHOLD, LAST))
    values = logits.float()  # [V]
    if draw.min_p > 0:
        floor = values.max() + draw.temperature * math.log(draw.min_p)
        values = values.masked_fill(values < floor, -torch.inf)
    bits = values.view(torch.int32)  # [V]
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # [V]
    place = torch.arange(len(order))  # [V]
    kept = (order > threshold) | ((order == threshold) & (place <= last))  # [V]
    return torch.nonzero(kept & values.isfinite()).flatten().tolist()


def _expected(logits: torch.Tensor, draw: Draw) -> list[int]:
    """The definition in float64: of equal logits, lower token ids come first."""
    scaled = logits.double() / draw.temperature  # [V]
    if draw.min_p > 0:
        scaled[scaled < scaled.max() + math.log(draw.min_p)] = -torch.inf
    order = scaled.sort(descending=True, stable=True).indices  # [V]
    if 0 < draw.top_k < len(order):
        order = order[: draw.top_k]
    p = scaled[order].softmax(-1)
    if draw.top_p < 1:
        order = order[(p.cumsum(-1) - p < draw.top_p) | (torch.arange(len(p)) == 0)]
    return sorted(t for t in order.tolist() if scaled[t] > -torch.inf)


CUTS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 299},
    {"top_k": 300},
    {"top_k": 10**6},
    {"top_p": 1e-9},
    {"top_p": 1e-45},
    {"top_p": 0.3},
    {"top_p": 0.95, "temperature": 3.0},
    {"top_p": 0.6, "temperature": 0.01},
    {"top_p": 0.9999},
    {"top_p": 1 - 1e-9},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 3, "top_p": 0.999},
    {"min_p": 0.05, "top_p": 0.8},
    {"min_p": 0.2, "top_k": 50},
    {"min_p": 1.0, "top_k": 2},
    {"min_p": 0.01, "top_k": 40, "top_p": 0.9, "temperature": 1.7},
]


def _rows(kind: str) -> torch.Tensor:
    row = torch.randn(300, generator=torch.Generator().manual_seed(7)) * 3  # [V]
    if kind == "ties":
        return row.round()
    if kind == "extreme":
        row[::3] = -torch.inf
        row[1::50] = -1e4
        row[[17, 29]] = 1e4
    if kind == "negative":
        return -row.abs() - 5
    if kind == "few":
        row[5:] = -torch.inf
    return row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "ties", "extreme", "negative", "few"])
def test_thresholds_are_the_definition(kind: str, dtype: torch.dtype) -> None:
    row = _rows(kind).to(dtype)  # [V]
    for cut in CUTS:
        draw = _one(**cut)
        found, wanted = _allowed(row, draw), _expected(row, draw)
        if draw.top_p == 1 - 1e-9:  # 1 in float32: what is left out would never be drawn
            assert set(wanted) <= set(found), cut
        else:
            assert found == wanted, cut


def test_a_flat_distribution_is_cut_by_token_id() -> None:
    row = torch.zeros(20000)  # [V], more than a tile
    for top_p in (0.25, 0.5, 0.9):
        kept = _allowed(row, _one(top_p=top_p))
        assert kept == list(range(len(kept))) and abs(len(kept) - 20000 * top_p) <= 1
    assert _allowed(row, _one(top_k=9001)) == list(range(9001))


def test_draws_stay_inside_the_cuts_and_reach_them() -> None:
    row = _rows("ties").bfloat16()
    for cut in ({"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.3}, {"top_k": 9, "top_p": 0.8}):
        draws = [_one(target=i, position=i, temperature=2.0, **cut) for i in range(40)]
        kept = set(_expected(row, draws[0]))
        drawn = set(_draw(row.unsqueeze(0), draws))
        assert drawn <= kept and len(drawn) > min(len(kept), 8) // 2


def test_top_k_1_is_the_likeliest_token() -> None:
    logits = torch.randint(0, 3, (6, 70), generator=torch.Generator().manual_seed(1)).half()
    draws = [_one(source=i, target=i, seed=i, top_k=1) for i in range(6)]
    assert _draw(logits, draws) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draw_is_the_same_in_every_batch(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 5000, generator=torch.Generator().manual_seed(2)).to(dtype)  # [N, V]
    for cut in ({}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.02}):
        fixed: dict[str, Any] = {"source": 2, "seed": 2**62 + 5, "position": 9, "temperature": 1.3}
        alone = _draw(logits, [_one(**fixed, **cut)])
        others = [_one(source=i, target=i, seed=i, top_p=0.5 + i / 10) for i in range(4)]
        assert _draw(logits, [*others, _one(**fixed, target=4, **cut)])[4] == alone[0]
    # and a longer vocabulary does not move the noise of the first tokens
    longer = torch.cat([logits, torch.full((5, 9000), -torch.inf, dtype=dtype)], dim=1)
    plain = [_one(position=i) for i in range(20)]
    for draw in plain:
        assert _draw(logits, [draw]) == _draw(longer, [draw])


def _chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0, 1.1, -0.4, 0.0, 0.9, -2.0, 1.5]])  # [1, 9]
    places = [(i, 0) if i % 2 else (7, i) for i in range(DRAWS)]  # both ways to differ
    draws = [
        _one(target=i, temperature=1.4, seed=seed, position=position)
        for i, (seed, position) in enumerate(places)
    ]
    counts = torch.bincount(torch.tensor(_draw(logits, draws)), minlength=9)  # [9]
    # 8 degrees of freedom: above 26.1 in one of 1000 cases
    assert _chi_square(counts, (logits[0] / 1.4).softmax(-1)) < 26.1


@triton.jit
def _store_noise(out, seed, TILE: tl.constexpr):
    position, tile = tl.program_id(0), tl.program_id(1)
    low = tl.load(seed).to(tl.uint32, bitcast=True)
    high = tl.load(seed + 1).to(tl.uint32, bitcast=True)
    noise = kernels._noise(tile, position.to(tl.uint32, bitcast=True), low, high, TILE)
    place = (position * tl.num_programs(1) + tile) * TILE + tl.arange(0, TILE)
    tl.store(out + place, noise)


def test_noise_is_gumbel_and_independent() -> None:
    positions, tiles, tile = 8, 4, 2048
    out = torch.empty(2, positions, tiles * tile, device=DEVICE)  # [seeds, positions, tokens]
    for index, seed in enumerate([(5, 0), (5, 1)]):
        key = torch.tensor(seed, dtype=torch.int32, device=DEVICE)  # [2]
        _store_noise[(positions, tiles)](out[index], key, tile)
    noise = out.cpu().double().reshape(-1, tiles * tile)  # [rows, tokens]
    sample = noise.flatten().sort().values
    n = len(sample)
    gap = ((-(-sample).exp()).exp() - (torch.arange(n) + 0.5) / n).abs().max()
    assert gap < 1.63 / math.sqrt(n)  # Kolmogorov and Smirnov, one of 100 cases
    uniform = (-(-noise).exp()).exp() - 0.5
    # Rows (positions, then seeds) and neighbouring tokens tell nothing of each other.
    rows = torch.corrcoef(uniform) - torch.eye(len(noise))
    assert rows.abs().max() < 5 / math.sqrt(tiles * tile)
    for lag in (1, 2, 3, 4, tile):
        products = uniform[:, lag:] * uniform[:, :-lag] * 12
        assert abs(products.mean()) < 4 / math.sqrt(products.numel())


def test_tokens_of_different_tiles_compete_fairly() -> None:
    size = 2 * kernels.RACE_TILE + 100
    logits = torch.full((1, size), -torch.inf)
    places = [3, kernels.RACE_TILE - 1, kernels.RACE_TILE, size - 1]
    logits[0, places] = torch.tensor([0.0, 1.0, 0.5, 0.8])
    draws = [_one(target=i, seed=i, position=3) for i in range(300)]
    drawn = torch.tensor(_draw(logits, draws))  # [D]
    counts = torch.stack([(drawn == place).sum() for place in places])  # [4]
    assert int(counts.sum()) == 300
    assert _chi_square(counts, logits[0, places].softmax(-1)) < 16.3  # 3 degrees, 1 of 1000


def test_a_flat_tail_has_its_share() -> None:
    """Among many unlikely tokens each has its chance: the noise is fine enough near 0."""
    logits = torch.full((1, 4000), -4.0)
    logits[0, 0] = math.log(3999) - 4.0
    draws = [_one(target=i, seed=i) for i in range(400)]
    tail = [token for token in _draw(logits, draws) if token]
    assert abs(len(tail) - 200) < 40 and len(set(tail)) > 0.85 * len(tail)
    assert abs(sum(tail) / len(tail) - 2000) < 300


def test_odd_rows_keep_a_token_of_the_vocabulary() -> None:
    logits = torch.stack(
        [
            torch.full((40,), -torch.inf),
            torch.full((40,), torch.nan),
            torch.cat([torch.full((39,), -torch.inf), torch.ones(1)]),
            torch.cat([torch.zeros(39), torch.full((1,), 1e4)]),
        ]
    )
    for cut in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}):
        draws = [_one(source=i, target=i, seed=i, **cut) for i in range(4)]
        tokens = _draw(logits, draws)
        assert all(0 <= token < 40 for token in tokens) and tokens[2:] == [39, 39]


def test_rows_may_be_padded_and_other_tokens_stay() -> None:
    padded = torch.zeros(3, 64)
    padded[:, 50:] = 1e4  # behind the vocabulary
    draws = [_one(source=1, target=2, seed=4), _one(source=2, target=0, seed=5)]
    logits = padded.to(DEVICE)[:, :50]  # [3, 50]
    tokens = torch.tensor([0, 33, 0], device=DEVICE)
    settings = torch.from_numpy(kernels.pack(draws, 50)).to(DEVICE)
    kernels.draw(logits, settings, tokens, cuts=False)
    assert tokens[1] == 33 and bool((tokens < 50).all())
