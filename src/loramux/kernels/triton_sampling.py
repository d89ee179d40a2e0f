"""Random tokens out of [N, V] logits on a GPU, each row by its own settings, nothing waited for.

A token is drawn by the exponential race: the winner is argmax of p / e with e ~ Exp(1), that is of
log p - log e. The noise of a token is a function of (seed, position, token id) alone: Philox with
the seed as key and (token // 4, position) as counter.

    _cut    one program a row: what top_k and top_p leave, as a threshold
    _race   one program a tile of a row: its best token
    _winner one program a row: the best of its tiles

What a row may draw is a filter in three parts: logits below the min_p floor count as -inf; of the
rest, those above a threshold; and those equal to it up to a last token id, since logits of 16 bits
are often equal. Logits are compared as integers of the same order.
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from loramux.kernels.triton_launch import cdiv, next_power_of_2

RACE_TILE = 4096
CUT_TILE = 8192
# Columns of the settings, int32 each, floats by their bits. `_cut` overwrites the last two.
COLUMNS = 12
SOURCE, TARGET, SEED_LOW, SEED_HIGH, POSITION, TOP_K = (tl.constexpr(i) for i in range(6))
TEMPERATURE, TOP_P, LOG_MIN_P, DEPTH, THRESHOLD = (tl.constexpr(i) for i in range(6, 11))
LAST = tl.constexpr(11)
NO_THRESHOLD = -(2**31)
# -log e lies in (-2.82, 22.88), so that a token so far below the likeliest one never wins.
HOPELESS = tl.constexpr(-26.0)
LARGEST_UNIFORM = tl.constexpr(1 - 2.0**-24)


@dataclass(frozen=True, slots=True)
class Draw:
    """One row to draw: where its logits and its token stand, and how it is drawn."""

    source: int  # row of the logits
    target: int  # place of the token; holds the likeliest token before
    seed: int
    position: int
    temperature: float
    top_k: int = 0  # below 1: every token
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def cuts(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0


def pack(draws: Sequence[Draw], size: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The settings of `draws` for a vocabulary of `size` tokens: int32 [COLUMNS, D]."""
    columns = np.empty((COLUMNS, len(draws)), dtype=np.int32)  # [C, D]
    seeds = np.array([d.seed & (2**63 - 1) for d in draws], dtype=np.int64)  # [D]
    top_p = np.array([d.top_p for d in draws], dtype=np.float64)  # [D]
    min_p = np.array([d.min_p for d in draws], dtype=np.float64)  # [D]
    with np.errstate(divide="ignore"):
        log_min_p = np.log(min_p)  # [D]
        # All tokens that are this much less likely than the likeliest one weigh, together, less
        # than what top_p leaves out: the threshold is not among them.
        depth = math.log(size) - np.log1p(-top_p) + 1.0  # [D]
    columns[SOURCE.value] = [d.source for d in draws]
    columns[TARGET.value] = [d.target for d in draws]
    columns[SEED_LOW.value] = (seeds & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
    columns[SEED_HIGH.value] = (seeds >> 32).astype(np.int32)
    columns[POSITION.value] = [d.position for d in draws]
    columns[TOP_K.value] = [min(max(d.top_k, 0), size) for d in draws]
    floats = ([d.temperature for d in draws], top_p, log_min_p, depth)
    for column, values in enumerate(floats, start=TEMPERATURE.value):
        columns[column] = np.asarray(values, dtype=np.float32).view(np.int32)
    columns[THRESHOLD.value] = NO_THRESHOLD
    columns[LAST.value] = size
    return columns


def draw(logits: torch.Tensor, settings: torch.Tensor, tokens: torch.Tensor, cuts: bool) -> None:
    """Replace the likeliest tokens in `tokens` [B] int64 by drawn ones.

    `logits` [N, V] has unit stride along V; `settings` is a `pack` on the device; `cuts` says
    whether a row has a top_k or a top_p. A row with nothing to draw from (NaN) keeps its token.
    """
    if logits.stride(-1) != 1:
        logits = logits.contiguous()  # [N, V]
    if cuts:
        cut(logits, settings, tokens)
    rows, size = settings.shape[1], logits.shape[1]
    tile = min(RACE_TILE, max(16, next_power_of_2(size)))
    tiles = cdiv(size, tile)
    scores = torch.empty(rows, tiles, dtype=torch.float32, device=logits.device)  # [D, tiles]
    winners = torch.empty(rows, tiles, dtype=torch.int32, device=logits.device)  # [D, tiles]
    warps = max(1, min(8, tile // 512))
    _race[(rows, tiles)](
        logits,
        logits.stride(0),
        tokens,
        settings,
        scores,
        winners,
        rows,
        size,
        tile,
        num_warps=warps,
    )
    _winner[(rows,)](
        tokens, settings, scores, winners, rows, tiles, next_power_of_2(tiles), num_warps=1
    )


def cut(logits: torch.Tensor, settings: torch.Tensor, tokens: torch.Tensor) -> None:
    """Write the thresholds of the rows with a top_k or a top_p into `settings`."""
    rows, size = settings.shape[1], logits.shape[1]
    tile = min(CUT_TILE, max(16, next_power_of_2(size)))
    # The low bits that are the same in every value of the type need no search.
    shift = {torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0)
    warps = max(1, min(16, tile // 512))
    _cut[(rows,)](
        logits, logits.stride(0), tokens, settings, rows, size, tile, shift, num_warps=warps
    )


@triton.jit
def _float(settings, column: tl.constexpr, rows, row):
    return tl.load(settings + column * rows + row).to(tl.float32, bitcast=True)


@triton.jit
def _peak(logits, stride, tokens, settings, rows, row):
    """Where a row's logits start, the largest of them, its temperature and its min_p floor."""
    source = tl.load(settings + SOURCE * rows + row).to(tl.int64)
    target = tl.load(settings + TARGET * rows + row)
    start = logits + source * stride
    peak = tl.load(start + tl.load(tokens + target)).to(tl.float32)
    temperature = _float(settings, TEMPERATURE, rows, row)
    floor = peak + temperature * _float(settings, LOG_MIN_P, rows, row)
    return start, peak, temperature, floor


@triton.jit
def _load(start, token, size, floor):
    """Logits of `token` [TILE] as float32, -inf below `floor` and behind the end."""
    values = tl.load(start + token, mask=token < size, other=-float("inf")).to(tl.float32)
    return tl.where(values >= floor, values, -float("inf"))  # [TILE]


@triton.jit
def _order(values, SHIFT: tl.constexpr):
    """float32 -> int32 of the same order, without the low SHIFT bits."""
    bits = values.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _relative(values, peak, temperature):
    """log(p / largest p); 0 at the peak, were it infinite."""
    return tl.where(values == peak, 0.0, (values - peak) / temperature)


@triton.jit
def _allowed(order, token, threshold, last):
    return (order > threshold) | ((order == threshold) & (token <= last))


@triton.jit
def _weigh(
    start, token, size, peak, temperature, floor, threshold, last,
    SHIFT: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """Order of the tokens, which are allowed, and their weight: p / largest p, or 1 of each."""
    values = _load(start, token, size, floor)
    order = _order(values, SHIFT)
    allowed = _allowed(order, token, threshold, last)
    if MASS:
        weight = tl.exp(_relative(values, peak, temperature))
    else:
        weight = tl.full(values.shape, 1.0, tl.float32)
    return order, allowed, tl.where(allowed, weight, 0.0)


@triton.jit
def _shrink(
    start, size, peak, temperature, floor, threshold, last, target, lowest,
    TILE: tl.constexpr, SHIFT: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """The fewest of the likeliest allowed tokens that weigh `target`: new threshold and last.

    The threshold is the largest order for which everything from it on weighs enough; it lies in
    [low, high], which each pass over the row divides by four.
    """
    offsets = tl.arange(0, TILE)
    low = _order(lowest, SHIFT).to(tl.int64)
    high = _order(peak, SHIFT).to(tl.int64)
    above = 0.0  # weight of what is above `high`
    while low < high:
        step = (high - low + 3) // 4
        first, second, third = low + step, tl.minimum(low + 2 * step, high), low + 3 * step
        third = tl.minimum(third, high)
        sum1 = tl.zeros([TILE], tl.float32)
        sum2 = tl.zeros([TILE], tl.float32)
        sum3 = tl.zeros([TILE], tl.float32)
        for begin in range(0, size, TILE):
            order, _, weight = _weigh(
                start, begin + offsets, size, peak, temperature, floor, threshold, last, SHIFT, MASS
            )
            sum1 += tl.where(order >= first.to(tl.int32), weight, 0.0)
            sum2 += tl.where(order >= second.to(tl.int32), weight, 0.0)
            sum3 += tl.where(order >= third.to(tl.int32), weight, 0.0)
        from1, from2, from3 = tl.sum(sum1), tl.sum(sum2), tl.sum(sum3)
        if from3 >= target:
            low = third
        elif from2 >= target:
            low, high, above = second, third - 1, from3
        elif from1 >= target:
            low, high, above = first, second - 1, from2
        else:
            high, above = first - 1, from1
    found = low.to(tl.int32)
    kept = -1
    for begin in range(0, size, TILE):
        token = begin + offsets
        order, allowed, weight = _weigh(
            start, token, size, peak, temperature, floor, threshold, last, SHIFT, MASS
        )
        equal = allowed & (order == found)
        if tl.max(equal.to(tl.int32)) > 0:
            weight = tl.where(equal, weight, 0.0)
            # The first ones, until the weight before one of them is enough.
            keep = equal & (above + (tl.cumsum(weight) - weight) < target)
            kept = tl.maximum(kept, tl.max(tl.where(keep, token, -1)))
            above += tl.sum(weight)
    return found, kept


@triton.jit(do_not_specialize=["rows"])
def _cut(
    logits, stride, tokens, settings, rows, size,
    TILE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """top_k, then top_p of the mass that top_k left. Grid (D,)."""
    row = tl.program_id(0)
    top_k = tl.load(settings + TOP_K * rows + row)
    top_p = _float(settings, TOP_P, rows, row)
    start, peak, temperature, floor = _peak(logits, stride, tokens, settings, rows, row)
    threshold = tl.load(settings + THRESHOLD * rows + row)
    last = tl.load(settings + LAST * rows + row)
    if (top_k > 0) & (top_k < size):
        lowest = tl.minimum(peak, -float("inf"))
        threshold, last = _shrink(
            start, size, peak, temperature, floor, threshold, last, top_k.to(tl.float32), lowest,
            TILE, SHIFT, False,
        )  # fmt: skip
    if top_p < 1.0:
        sums = tl.zeros([TILE], tl.float32)
        for begin in range(0, size, TILE):
            _, _, weight = _weigh(
                start, begin + tl.arange(0, TILE), size, peak, temperature, floor,
                threshold, last, SHIFT, True,
            )  # fmt: skip
            sums += weight
        target = tl.maximum(top_p * tl.sum(sums), 1e-30)  # the likeliest token always stays
        lowest = tl.maximum(peak - temperature * _float(settings, DEPTH, rows, row), floor)
        threshold, last = _shrink(
            start, size, peak, temperature, floor, threshold, last, target, lowest,
            TILE, SHIFT, True,
        )  # fmt: skip
    # Other kernels compare whole orders; the low bits of an order are those of its sign.
    whole = (threshold << SHIFT) | tl.where(threshold < 0, (1 << SHIFT) - 1, 0)
    whole = tl.where(threshold == -2147483648, threshold, whole)
    tl.store(settings + THRESHOLD * rows + row, whole)
    tl.store(settings + LAST * rows + row, last)


@triton.jit
def _noise(tile, position, low, high, TILE: tl.constexpr):
    """-log of Exp(1) draws for the tokens of a tile [TILE]."""
    counter = (tile * (TILE // 4) + tl.arange(0, TILE // 4)).to(tl.uint32, bitcast=True)
    zero = counter * 0
    c0, c1, c2, c3 = tl.philox_impl(counter, zero + position, zero, zero, zero + low, zero + high)
    bits = tl.join(tl.join(c0, c2), tl.join(c1, c3)).reshape(TILE)  # c0, c1, c2, c3, c0, ...
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, LARGEST_UNIFORM)
    # -log(1 - u): near 0, where races are won, 1 - u would lose the bits of u.
    series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0 + uniform * 0.25)))
    return -tl.log(tl.where(uniform < 0.015625, series, -tl.log(1.0 - uniform)))


@triton.jit(do_not_specialize=["rows"])
def _race(logits, stride, tokens, settings, scores, winners, rows, size, TILE: tl.constexpr):
    """Best score of each tile and its token. Grid (D, tiles)."""
    row, tile = tl.program_id(0), tl.program_id(1)
    start, peak, temperature, floor = _peak(logits, stride, tokens, settings, rows, row)
    threshold = tl.load(settings + THRESHOLD * rows + row)
    last = tl.load(settings + LAST * rows + row)
    token = tile * TILE + tl.arange(0, TILE)
    values = _load(start, token, size, floor)
    allowed = _allowed(_order(values, 0), token, threshold, last)
    relative = _relative(values, peak, temperature)
    # Whatever is not greater is out, NaN too. Where the peak is -inf, all are at the peak.
    possible = allowed & (relative > HOPELESS) & (values > -float("inf"))
    relative = tl.where(possible, relative, -float("inf"))
    score, winner = -float("inf"), 0
    if tl.max(relative) > HOPELESS:
        position = tl.load(settings + POSITION * rows + row).to(tl.uint32, bitcast=True)
        low = tl.load(settings + SEED_LOW * rows + row).to(tl.uint32, bitcast=True)
        high = tl.load(settings + SEED_HIGH * rows + row).to(tl.uint32, bitcast=True)
        noise = _noise(tile, position, low, high, TILE)
        score, place = tl.max(relative + noise, axis=0, return_indices=True)
        winner = tile * TILE + place
    out = row * tl.num_programs(1) + tile
    tl.store(scores + out, score)
    tl.store(winners + out, winner)


@triton.jit(do_not_specialize=["rows"])
def _winner(tokens, settings, scores, winners, rows, tiles, TILES: tl.constexpr):
    """tokens[target] = the token of the best tile. Grid (D,)."""
    row = tl.program_id(0)
    tile = tl.arange(0, TILES)
    score = tl.load(scores + row * tiles + tile, mask=tile < tiles, other=-float("inf"))
    best, place = tl.max(score, axis=0, return_indices=True)
    if best > -float("inf"):
        target = tl.load(settings + TARGET * rows + row)
        tl.store(tokens + target, tl.load(winners + row * tiles + place).to(tl.int64))
