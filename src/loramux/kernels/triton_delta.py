"""The LoRA delta of a tile or of a row on a GPU: what every kernel that adds one calls.

What a step holds is read on the device from its `WorkList`; a grid depends on shapes alone, so a
captured graph stays right for every mixture. Programs loop over the work in strides of the grid.
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels.arguments import AFFINE, Expand, LoRASite, WorkList
from loramux.kernels.triton_launch import Known, facts_of

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Triton runs in Python, where bf16 products are wrong and casts to bf16 cut off."""

FLAG = tl.constexpr(AFFINE)

MATRIX_ROWS = 16
"""Rows that a matrix product has at least."""

COLUMNS = 128
"""Width of the output tiles of an expand where a tile may lie in two slices."""


class Tile(NamedTuple):
    """What one program expands at a time, and with how many warps."""

    rows: int
    columns: int
    ranks: int
    warps: int


TILE = Tile(8, COLUMNS, 16, 2)
"""The fastest on an H100, for decode steps of 1 to 256 tokens and ranks of up to 16."""

WIDE_TILES = (TILE, Tile(8, COLUMNS, 32, 4), Tile(8, COLUMNS, 64, 4))
"""The same where all tiles run at once, the first that holds the largest rank: it asks for b in one go,
not for 16 ranks after another. Where tiles wait for others, `TILE` needs fewer registers."""

WIDE_PROGRAMS_PER_UNIT = 3
"""So many of the widest run at once on an H100's multiprocessor, in a gate (144 registers)."""

LARGE_TILE = Tile(16, COLUMNS, 16, 4)
"""The same for steps with larger chunks: with 8,192 tokens as fast as `TILE` at rank 16, up to 15 %
faster at ranks 32 to 128, where a tile loads more of b than of its own."""

LARGE_CHUNK = 16
"""Chunks of more rows are none of a captured graph's, which would start many programs for nothing."""

MOST_ITEMS = 1 << 16
"""More there are only where `max_chunks` is far above the chunks in use, as it is for a routing."""

PROGRAMS_PER_UNIT = 8
"""Programs a multiprocessor gets at most; each streams little, so several must run at once."""


class Lora(NamedTuple):
    """An `Expand` (or a shrink's arguments) as a kernel takes it."""

    h: torch.Tensor  # [P, T, W]
    part_stride: int
    row_stride: int
    h_width: int
    b: torch.Tensor  # [R, N]
    row_r: torch.Tensor  # [S, R]
    row_scale: torch.Tensor  # [S, R]
    pool_rows: int
    affine: torch.Tensor  # [2, P, N]
    affine_stride: int  # from gains to shifts
    place_rows: int
    chunks: torch.Tensor  # [C, 8]
    counts: torch.Tensor  # [2]
    member_rows: torch.Tensor  # [M]
    member_columns: torch.Tensor  # [M]
    member_scales: torch.Tensor  # [M]
    member_ranks: torch.Tensor  # [M]


def packed(site: LoRASite, h: torch.Tensor, work: WorkList) -> Known:
    """A `Lora`; what is of the site and of the step is put together once for each."""
    of_h = (h, h.stride(0), h.stride(1), h.shape[2])
    of_site, of_work = site.notes.get("gpu"), work.notes.get("gpu")
    if of_site is None:
        of_site = site.notes["gpu"] = Known.of(
            *(site.b, site.row_r, site.row_scale, site.row_r.shape[1]),
            *(site.affine, site.affine.stride(0), site.place_rows),
        )
    if of_work is None:
        of_work = work.notes["gpu"] = Known.of(
            *(work.chunks, work.counts, work.member_rows, work.member_columns),
            *(work.member_scales, work.member_ranks),
        )
    return Known(
        Lora(*of_h, *of_site.value, *of_work.value), (facts_of(of_h), of_site.facts, of_work.facts)
    )


@cache
def _units(device: torch.device) -> int:
    if device.type == "cpu":
        return 64  # interpreted: enough that small cases get all kinds of tiles
    units: int = torch.cuda.get_device_properties(device).multi_processor_count
    return units


def _most_programs(device: torch.device) -> int:
    if device.type == "cpu":
        return 5  # interpreted: few, so that the tests see programs loop
    return _units(device) * PROGRAMS_PER_UNIT


def programs(items: int, device: torch.device) -> tuple[int]:
    """The grid for at most so many work items."""
    return (min(items, _most_programs(device)),)


def tile_programs(expand: Expand, tiles: int) -> tuple[int]:
    """The grid of an expand with `tiles` tiles a chunk."""
    items = expand.work.max_chunks * tiles
    if expand.work.rows_per_chunk > LARGE_CHUNK and items <= MOST_ITEMS:
        return (items,)
    return programs(items, expand.h.device)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """`x` in `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def product(left, right):
    """`left` [M, K] @ `right` [K, N], summed in float32."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def chunk_of(lora, index):
    """Chunk `index`: first row, end row, first member, end member, and of the first member its pool
    row, column, scale, rank rows, and whether it has gains and shifts."""
    at = lora.chunks + index * 8
    scale = tl.load(at + 6).to(tl.float32, bitcast=True)
    word = tl.load(at + 7)
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4),
        tl.load(at + 5), scale, word & (FLAG - 1), word >= FLAG,
    )  # fmt: skip


@triton.jit
def chunk_and_end(lora, item, TILES: tl.constexpr):
    """The chunk of work item `item`, and the end of the items; each chunk has `TILES`.

    Both are asked for at once, so a chunk behind the last may come: a record of zeros. A program
    must ask anew for each item: ptxas 12.8 confuses a record that a loop carries along."""
    return chunk_of(lora, item // TILES), tl.load(lora.counts + 1) * TILES


@triton.jit
def member_after(lora, p, member, stop):
    """(pool row, column, scale, rank rows, whether it has gains and shifts) of the member after
    `member`, whose pool row is `p`.

    An expert's chunk has moved all its members, so the lists only say how far they are apart.
    Nothing is loaded after the last member, and nobody looks at what comes back."""
    more = member + 1 < stop
    here = tl.load(lora.member_rows + member, mask=more, other=0)
    word = tl.load(lora.member_ranks + member + 1, mask=more, other=0)
    return (
        p + tl.load(lora.member_rows + member + 1, mask=more, other=0) - here,
        tl.load(lora.member_columns + member + 1, mask=more, other=0),
        tl.load(lora.member_scales + member + 1, mask=more, other=0.0),
        word & (FLAG - 1),
        word >= FLAG,
    )


@triton.jit
def rank_and_factor(lora, s, p, scale, ranks):
    """The adapter's rank in slice `s`, at most `ranks`, and what its delta is multiplied by."""
    at = s * lora.pool_rows + p
    r = tl.minimum(tl.load(lora.row_r + at), ranks)
    factor = tl.load(lora.row_scale + at) * scale
    return r, tl.where(r > 0, factor, 0.0)  # what is left alone may have any scale


@triton.jit
def slice_bounds(s, STARTS: tl.constexpr):
    """First and end column of slice `s`."""
    SLICES: tl.constexpr = len(STARTS) - 1
    begin = 0
    end = STARTS[1]
    for other in tl.static_range(1, SLICES):
        begin = tl.where(s >= other, STARTS[other], begin)
        end = tl.where(s >= other, STARTS[other + 1], end)
    return begin, end


@triton.jit
def slices_between(low, high, STARTS: tl.constexpr):
    """The slices that columns low..high-1 lie in: first and last."""
    SLICES: tl.constexpr = len(STARTS) - 1
    first = 0
    last = 0
    for other in tl.static_range(1, SLICES):
        first += tl.where(low >= STARTS[other], 1, 0)
        last += tl.where(high > STARTS[other], 1, 0)
    return first, last


@triton.jit
def slice_at(column, STARTS: tl.constexpr):
    """The slice that `column` lies in."""
    s = 0
    for other in tl.static_range(1, len(STARTS) - 1):
        s += tl.where(column >= STARTS[other], 1, 0)
    return s


@triton.jit
def shrunk(lora, at, mask, PARTS: tl.constexpr):
    """The sum of the parts of `h` at the offsets `at`, rounded to the dtype of `b`."""
    total = tl.load(lora.h + at, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        one = tl.load(lora.h + part * lora.part_stride + at, mask=mask, other=0.0)
        total += one.to(tl.float32)
    return rounded(total, lora.b.dtype.element_ty)


@triton.jit
def b_tile(lora, p, ranks, bound, r, columns, own, WIDTH: tl.constexpr):
    """Rows p + `ranks` of `b` at `columns`: zeros from rank r on.

    The load is bounded by what the work list says, and does not wait for `r`."""
    at = (p + ranks).to(tl.int64)[:, None] * WIDTH + columns[None, :]
    value = tl.load(lora.b + at, mask=(ranks < bound)[:, None] & own[None, :], other=0.0)
    return tl.where((ranks < r)[:, None], value, 0.0)


@triton.jit
def gain_and_shift(lora, p, columns, own, WIDTH: tl.constexpr):
    """What the adapter in row `p` does to the output at `columns`: [COLS] float32 each, zeros where
    not `own`."""
    at = lora.affine + (p // lora.place_rows).to(tl.int64) * WIDTH + columns
    gain = tl.load(at, mask=own, other=0.0).to(tl.float32)
    shift = tl.load(at + lora.affine_stride, mask=own, other=0.0).to(tl.float32)
    return gain, shift


@triton.jit
def with_delta(value, gain, delta, AFFINE: tl.constexpr):
    """The output `value` [ROWS, COLS] float32 with what `chunk_delta` or `tile_delta` found."""
    if AFFINE:
        delta = value * gain[None, :] + delta
    return value + delta


@triton.jit
def chunk_delta(
    lora, chunk, rows, row_mask, low, columns, column_mask,
    STARTS: tl.constexpr, PARTS: tl.constexpr, AFFINE: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """The delta [ROWS, COLS] float32 of a chunk's `rows` at `columns`, which begin at `low`, by
    matrix products, and the gain [COLS] of the output before. What nobody owns may be NaN: it is not
    multiplied."""
    SLICES: tl.constexpr = len(STARTS) - 1
    WIDTH: tl.constexpr = STARTS[SLICES]
    total = tl.zeros((ROWS, COLS), tl.float32)
    gains = tl.zeros((COLS,), tl.float32)
    first_slice, last_slice = slices_between(low, low + COLS, STARTS)
    for s in range(first_slice, last_slice + 1):
        own = column_mask
        if SLICES > 1:
            begin, end = slice_bounds(s, STARTS)
            own = column_mask & (columns >= begin) & (columns < end)
        p, column, scale, bound, affine = chunk[4], chunk[5], chunk[6], chunk[7], chunk[8]
        for member in range(chunk[2], chunk[3]):
            if AFFINE:
                gain, shift = gain_and_shift(lora, p, columns, own & affine, WIDTH)
            r, factor = rank_and_factor(lora, s, p, scale, bound)
            for k in range(0, bound, 16):
                ranks = k + tl.arange(0, 16)
                at = rows.to(tl.int64)[:, None] * lora.row_stride
                at += ((column + ranks) * SLICES + s)[None, :]
                # Neither load waits for r.
                left = shrunk(lora, at, row_mask[:, None] & (ranks < bound)[None, :], PARTS)
                left = tl.where((ranks < r)[None, :], left, 0.0)  # [ROWS, 16]
                right = b_tile(lora, p, ranks, bound, r, columns, own, WIDTH)  # [16, COLS]
                total += product(left, right) * factor
            if AFFINE:
                total += total * gain[None, :] + shift[None, :]
                gains += gains * gain + gain
            p, column, scale, bound, affine = member_after(lora, p, member, chunk[3])
    return total, gains


@triton.jit
def _h_tile(
    lora, rows, live, s, column, ranks, r, SLICES: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """h [ROWS, RANKS] at `ranks`, zeros from rank `r` on: the load does not wait for `r`."""
    at = (column + ranks) * SLICES + s
    inside = at < lora.h_width
    at = rows.to(tl.int64)[:, None] * lora.row_stride + at[None, :]
    h = shrunk(lora, at, live[:, None] & inside[None, :], PARTS)
    return tl.where((ranks < r)[None, :], h, 0.0)


@triton.jit
def tile_delta(
    lora, chunk, rows, live, s, columns, other_s, other_columns, column_mask,
    STARTS: tl.constexpr, PARTS: tl.constexpr, AFFINE: tl.constexpr, PAIR: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    """The deltas [ROWS, COLS] float32 of rows of a chunk at `columns`, which lie in slice `s`, and
    with `PAIR` at `other_columns` in slice `other_s`; and the gains [COLS] of the output before, at
    both.

    The columns stand where a matrix product has its rows, of which it has at least 16: the tokens
    may then be 8. One copy of the body serves all members and ranks, and both tiles: programs may
    loop, and a loop whose instructions do not fit their cache is many times slower."""
    SLICES: tl.constexpr = len(STARTS) - 1
    WIDTH: tl.constexpr = STARTS[SLICES]
    one = tl.zeros((columns.shape[0], rows.shape[0]), tl.float32)
    other = one
    gains = tl.zeros((columns.shape[0],), tl.float32)
    other_gains = gains
    p, column, scale, bound, affine = chunk[4], chunk[5], chunk[6], chunk[7], chunk[8]
    for member in range(chunk[2], chunk[3]):
        if AFFINE:
            gain, shift = gain_and_shift(lora, p, columns, column_mask & affine, WIDTH)
        if AFFINE and PAIR:
            other_gain, other_shift = gain_and_shift(
                lora, p, other_columns, column_mask & affine, WIDTH
            )  # fmt: skip
        r, factor = rank_and_factor(lora, s, p, scale, bound)
        other_r, other_factor = rank_and_factor(lora, other_s, p, scale, bound)
        for k in range(0, bound, RANKS):
            ranks = k + tl.arange(0, RANKS)
            b = b_tile(lora, p, ranks, bound, r, columns, column_mask, WIDTH)  # [RANKS, COLS]
            h = _h_tile(lora, rows, live, s, column, ranks, r, SLICES, PARTS)
            if PAIR:
                other_b = b_tile(
                    lora, p, ranks, bound, other_r, other_columns, column_mask, WIDTH
                )  # fmt: skip
                other_h = _h_tile(lora, rows, live, other_s, column, ranks, other_r, SLICES, PARTS)
                other += product(tl.trans(other_b), tl.trans(other_h)) * other_factor
            one += product(tl.trans(b), tl.trans(h)) * factor
        if AFFINE:
            one += one * gain[:, None] + shift[:, None]
            gains += gains * gain + gain
        if AFFINE and PAIR:
            other += other * other_gain[:, None] + other_shift[:, None]
            other_gains += other_gains * other_gain + other_gain
        p, column, scale, bound, affine = member_after(lora, p, member, chunk[3])
    return tl.trans(one), tl.trans(other), gains, other_gains


@cache
def tile_columns(slice_starts: tuple[int, ...], width: int = COLUMNS) -> int:
    """Width of the tiles of an expand, `width` at most, none of which lies in two slices: so it divides
    all their bounds. 0: there is no such width, take the general way."""
    while width >= 16 and any(start % width for start in slice_starts):
        width //= 2
    return width if width >= 16 else 0


def tile_arguments(expand: Expand, tiles: int) -> dict[str, Any]:
    """What the kernels with `tiles` tiles a chunk take beside their columns."""
    work, tile = expand.work, TILE
    if work.rows_per_chunk > LARGE_CHUNK:
        tile = LARGE_TILE
    elif work.max_chunks * tiles <= _units(expand.h.device) * WIDE_PROGRAMS_PER_UNIT:
        # 64 ranks of a gate in float32 are 70 KB of shared memory, which not every GPU has.
        ranks = min(work.max_ranks, 32) if expand.site.b.element_size() > 2 else work.max_ranks
        tile = next((tile for tile in WIDE_TILES if ranks <= tile.ranks), WIDE_TILES[-1])
    return {"ROWS": tile.rows, "RANKS": tile.ranks, "num_warps": tile.warps, "num_stages": 1}


def kernel_arguments(expand: Expand | None) -> dict[str, Any]:
    """What `launch` is told of a kernel with a folded delta; without one, its `lora` is None."""
    if expand is None:
        return {"known": None, "STARTS": (0,), "PARTS": 1, "AFFINE": False}
    site, h = expand.site, expand.h
    return {
        "known": packed(site, h, expand.work),
        "STARTS": site.slice_starts,
        "PARTS": h.shape[0],
        "AFFINE": expand.work.affine,
    }
