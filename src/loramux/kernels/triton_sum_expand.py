"""A sum over GPUs that takes the LoRA delta behind it along, for small steps.

A row layer's partial products and its shrunk activations stand side by side, see `layers.sharded`. As
one sum and an expand behind it that is two kernels, of which the second waits for the first. Here each
program sums a tile of the products as in `triton_exchange`, sums the few shrunk activations that
this tile needs as well, and adds the delta. While messages are on their way it loads B. What several
tiles need is sent once.
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels import triton_exchange
from loramux.kernels.arguments import LoRASite, WorkList
from loramux.kernels.triton_delta import (
    LARGE_CHUNK,
    chunk_of,
    member_after,
    packed,
    product,
    rank_and_factor,
    rounded,
    tile_columns,
)
from loramux.kernels.triton_exchange import (
    ELEMENTS,
    Mailboxes,
    high_number,
    in_two_rounds,
    low_number,
    next_epoch,
    num_words,
    received,
    send,
    with_word,
    word_of,
)
from loramux.kernels.triton_launch import cdiv, launch, wait

ROWS, COLUMNS = 8, 256
"""Of a tile."""

LEAST_COLUMNS = 32
"""A product has at least 16 rows, and half a tile's columns stand there."""

RANKS = 32
"""That a program takes at a time, each time waiting for messages; 64 take more registers than it has."""

MOST_COLUMNS = 512
"""Of shrunk activations. More are of many adapters, whose chunks have few rows: then a program has
several tiles, one after the other, and it is sooner to let an expand's many programs do that."""


@triton.jit
def begun(
    lora, boxes, RANK: tl.constexpr, SIZE: tl.constexpr, TILES: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """This program, the end of the items of the work, the epoch, where its half of a mailbox begins and
    where this rank's slot in it.

    There is one item at least: whoever is two epochs further must have heard of everybody in the epoch
    between, so without rows a row is exchanged that counts for nothing."""
    program = tl.program_id(0)
    end = tl.maximum(tl.load(lora.counts + 1), 1) * TILES
    wait(EARLY)
    epoch = next_epoch(boxes.epochs)
    half = (epoch & 1).to(tl.int64) * SIZE * boxes.slot_words
    return program, end, epoch, half, half + RANK * boxes.slot_words


@triton.jit
def item_at(lora, item, TILES: tl.constexpr, COLS: tl.constexpr):
    """The chunk of an item of the work, and the places of its tile's words in a row [COLS / 2]."""
    places = item % TILES * (COLS // 2) + tl.arange(0, COLS // 2)
    first, end, member, members, p, column, scale, bound, _affine = chunk_of(lora, item // TILES)
    end = tl.maximum(end, 1)  # without rows it is (0, 0)
    return (first, end, member, members, p, column, scale, bound), places


@triton.jit
def rows_from(first, end, row_words, places, ROWS: tl.constexpr):
    """Of ROWS rows from `first` on, which there are up to `end`: the rows, the words at `places` of each
    [ROWS, COLS / 2], and which of these there are."""
    rows = first + tl.arange(0, ROWS)
    at = rows[:, None] * row_words + places[None, :]
    return rows, at, (rows < end)[:, None] & (places >= 0)[None, :]


@triton.jit
def _h_at(rows, end, row_words, WIDTH: tl.constexpr, column, ranks, bound):
    """Where a member's h at `ranks` stands [ROWS, RANKS]: in words of two numbers, so most come twice;
    and which of these there are, up to rank `bound`."""
    at = rows[:, None] * row_words + (WIDTH + column + ranks)[None, :] // 2
    return at, (rows < end)[:, None] & (ranks < bound)[None, :]


@triton.jit
def _b_words(b, p, ranks, bound, places, WIDTH: tl.constexpr):
    """Rows p + `ranks` of b [R, WIDTH], up to `bound`, at `places` of words: [RANKS, COLS / 2]."""
    at = (p + ranks).to(tl.int64)[:, None] * (WIDTH // 2) + places[None, :]
    return tl.load(b + at, mask=(ranks < bound)[:, None], other=0)


@triton.jit
def _send_to_all(z, at, mask, boxes, slot, epoch, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Send this rank's words at `at` to their places in its slot of all other mailboxes."""
    word = tl.load(z + at, mask=mask, other=0)
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            send(boxes.addresses, rank, slot + at, word, epoch, mask)


@triton.jit
def sends_shrunk(item, TILES: tl.constexpr):
    """Whether this program sends its chunk's h with this item: of the programs that need it the one with
    the lowest number, so that all wait for those of their own number and lower ones, which run."""
    program = tl.program_id(0)
    return (program == 0) | ((item % TILES == 0) & (program + TILES <= tl.num_programs(0)))


@triton.jit
def send_shrunk(
    z, row_words, lora, chunk, rows, boxes, slot, epoch,
    RANK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Send the h that a chunk's `rows` need, which stands behind column WIDTH of z, to all others."""
    ranks = tl.arange(0, RANKS)
    p, column, bound = chunk[4], chunk[5], chunk[7]
    for member in range(chunk[2], chunk[3]):
        for k in range(0, bound, RANKS):
            at, mask = _h_at(rows, chunk[1], row_words, WIDTH, column, k + ranks, bound)
            # A word has two of these numbers.
            once = ((column + k + ranks) % 2 == 0) | (k + ranks == 0)
            _send_to_all(z, at, mask & once[None, :], boxes, slot, epoch, RANK, SIZE)
        p, column, _scale, bound, _affine = member_after(lora, p, member, chunk[3])


@triton.jit
def _summed(
    z, at, mask, boxes, mailbox, epoch,
    RANK: tl.constexpr, SIZE: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    """Of the first and of the second number of all ranks' words at `at`, rounded: float32."""
    low = tl.zeros_like(at).to(tl.float32)
    high = low
    for rank in tl.static_range(SIZE):
        if rank == RANK:
            word = tl.load(z + at, mask=mask, other=0)
        else:
            word = received(mailbox + rank * boxes.slot_words, at, mask, epoch, boxes.alive)
        low, high = with_word(low, high, word, False, ELEMENT)
    return rounded(low, ELEMENT).to(tl.float32), rounded(high, ELEMENT).to(tl.float32)


@triton.jit
def summed_with_delta(
    z, row_words, lora, chunk, rows, at, mask, places, boxes, mailbox, epoch,
    RANK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, B_WIDTH: tl.constexpr,
    ELEMENT: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """As `_summed` of the words at `at`, with the deltas of a chunk's `rows`: B's words at `places`, and
    of h the sums of all ranks."""
    b = lora.b.to(tl.pointer_type(tl.int32), bitcast=True)
    ranks = tl.arange(0, RANKS)
    p, column, scale, bound = chunk[4], chunk[5], chunk[6], chunk[7]
    r, factor = rank_and_factor(lora, 0, p, scale, bound)
    b_word = _b_words(b, p, ranks, bound, places, B_WIDTH)  # before anybody is waited for
    low, high = _summed(z, at, mask, boxes, mailbox, epoch, RANK, SIZE, ELEMENT)
    delta_low = tl.trans(tl.zeros_like(low))
    delta_high = delta_low
    for member in range(chunk[2], chunk[3]):
        for k in range(0, bound, RANKS):
            if k > 0:
                b_word = _b_words(b, p, k + ranks, bound, places, B_WIDTH)
            h_at, h_mask = _h_at(rows, chunk[1], row_words, WIDTH, column, k + ranks, bound)
            one, two = _summed(z, h_at, h_mask, boxes, mailbox, epoch, RANK, SIZE, ELEMENT)
            h = tl.where(((column + k + ranks) % 2 == 1)[None, :], two, one)
            h = tl.where((k + ranks < r)[None, :], h, 0.0).to(ELEMENT)  # [ROWS, RANKS]
            b_word = tl.where((k + ranks < r)[:, None], b_word, 0)  # [RANKS, COLS / 2]
            b_low = low_number(b_word, False, ELEMENT).to(ELEMENT)
            b_high = high_number(b_word, ELEMENT).to(ELEMENT)
            delta_low += product(tl.trans(b_low), tl.trans(h)) * factor
            delta_high += product(tl.trans(b_high), tl.trans(h)) * factor
        p, column, scale, bound, _affine = member_after(lora, p, member, chunk[3])
        r, factor = rank_and_factor(lora, 0, p, scale, bound)
        b_word = _b_words(b, p, ranks, bound, places, B_WIDTH)
    return low + tl.trans(delta_low), high + tl.trans(delta_high)


@triton.jit
def _sum_and_expand(
    z, row_words, boxes, lora, RANK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    ELEMENT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """z [T, WIDTH + W] of all ranks, in words of two ELEMENTs: its first WIDTH columns become the sums
    and the delta of the sums of the others."""
    TILES: tl.constexpr = WIDTH // COLS
    z = z.to(tl.pointer_type(tl.int32), bitcast=True)
    program, end, epoch, half, slot = begun(lora, boxes, RANK, SIZE, TILES, EARLY)
    for item in range(program, end, tl.num_programs(0)):
        chunk, places = item_at(lora, item, TILES, COLS)
        for first in range(chunk[0], chunk[1], ROWS):
            rows, at, mask = rows_from(first, chunk[1], row_words, places, ROWS)
            if sends_shrunk(item, TILES):
                send_shrunk(
                    z, row_words, lora, chunk, rows, boxes, slot, epoch, RANK, SIZE, WIDTH, RANKS
                )  # fmt: skip
            _send_to_all(z, at, mask, boxes, slot, epoch, RANK, SIZE)
    mailbox = tl.load(boxes.addresses + RANK).to(tl.pointer_type(tl.int64)) + half
    for item in range(program, end, tl.num_programs(0)):
        chunk, places = item_at(lora, item, TILES, COLS)
        for first in range(chunk[0], chunk[1], ROWS):
            rows, at, mask = rows_from(first, chunk[1], row_words, places, ROWS)
            low, high = summed_with_delta(
                z, row_words, lora, chunk, rows, at, mask, places, boxes, mailbox, epoch,
                RANK, SIZE, WIDTH, WIDTH, ELEMENT, RANKS,
            )  # fmt: skip
            tl.store(z + at, word_of(low, high, False, ELEMENT), mask=mask)
    tl.store(boxes.epochs + program, epoch)


def fits(z: torch.Tensor, site: LoRASite, work: WorkList) -> bool:
    """Whether these are of a step that graphs capture, with shrunk activations of a product and without
    gains and shifts."""
    small = work.rows_per_chunk <= LARGE_CHUNK and site.num_slices == site.experts == 1
    plain = not work.affine and site.b.dtype == z.dtype and site.b.is_contiguous()
    even = z.element_size() == 2 and z.is_contiguous() and z.shape[1] % 2 == 0
    return small and plain and even and z.dtype in ELEMENTS


def can_take(
    z: torch.Tensor, columns: int, site: LoRASite, work: WorkList, mailboxes: Mailboxes
) -> bool:
    """Whether `sum_and_expand` can: what `fits`, in one round, where this rank has all of B."""
    if not fits(z, site, work) or site.slice_starts[-1] != columns:
        return False
    if tile_columns(site.slice_starts, COLUMNS) < LEAST_COLUMNS:
        return False
    words = num_words(z.unsqueeze(0))
    return 0 < words <= mailboxes.slot_words and not in_two_rounds(words, mailboxes)


def is_sooner(z: torch.Tensor, site: LoRASite) -> bool:
    """Whether that takes less time than a sum and an expand: where a program has one tile, and of few
    adapters, which cut the rows into few more."""
    width = site.slice_starts[-1]
    tiles = cdiv(z.shape[0], ROWS) * (width // tile_columns(site.slice_starts, COLUMNS))
    return tiles <= triton_exchange.PROGRAMS and z.shape[1] - width <= MOST_COLUMNS


def sum_and_expand(
    z: torch.Tensor, site: LoRASite, work: WorkList, mailboxes: Mailboxes
) -> torch.Tensor:
    """z [T, N + W] of all ranks, which is lost -> [T, N]: the sums of its first columns, with the delta
    of the sums of the others, which are an `Expand`'s h. Of rows in no chunk anything."""
    width = site.slice_starts[-1]
    launch(
        _sum_and_expand,
        (triton_exchange.PROGRAMS,),
        (z, z.shape[1] // 2, mailboxes.packed.value),
        packed(site, z[:, width:].unsqueeze(0), work),
        RANK=mailboxes.rank,
        SIZE=mailboxes.size,
        WIDTH=width,
        ELEMENT=ELEMENTS[z.dtype],
        ROWS=ROWS,
        COLS=tile_columns(site.slice_starts, COLUMNS),
        RANKS=RANKS,
        num_warps=triton_exchange.WARPS,
    )
    return z[:, :width]
