"""A sum over GPUs that takes the LoRA delta along, in two rounds: each rank sums a share of the columns.

As `triton_sum_expand`, but what a program sums is a tile of this rank's own columns, to which it adds
the delta before it sends them to all others. So a rank reads B at its own columns alone, and need not
have more of it: by default, where a sum takes two rounds anyway, that spares it the other ranks' part of
B; with fully sharded LoRA, whose ranks have no more, three kernels become one.
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels import triton_exchange
from loramux.kernels.arguments import LoRASite, WorkList
from loramux.kernels.triton_delta import packed, tile_columns
from loramux.kernels.triton_exchange import (
    ELEMENTS,
    Mailboxes,
    num_words,
    received,
    send,
    word_of,
)
from loramux.kernels.triton_launch import cdiv, launch, next_power_of_2
from loramux.kernels.triton_sum_expand import (
    COLUMNS,
    LEAST_COLUMNS,
    MOST_COLUMNS,
    RANKS,
    ROWS,
    begun,
    fits,
    item_at,
    rows_from,
    send_shrunk,
    sends_shrunk,
    summed_with_delta,
)


@triton.jit
def _sum_and_expand_in_two(
    z, row_words, boxes, lora, RANK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    B_WIDTH: tl.constexpr, ELEMENT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    RANKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """z [T, WIDTH + W] of all ranks, in words of two ELEMENTs: its first WIDTH columns become the sums
    and the delta of the sums of the others. Rank k has the k-th share of the columns. Of B there are
    all WIDTH columns, or this rank's."""
    SHARE: tl.constexpr = WIDTH // SIZE // 2  # words
    TILES: tl.constexpr = WIDTH // SIZE // COLS
    B_FIRST: tl.constexpr = RANK * SHARE if B_WIDTH == WIDTH else 0
    z = z.to(tl.pointer_type(tl.int32), bitcast=True)
    program, end, epoch, half, slot = begun(lora, boxes, RANK, SIZE, TILES, EARLY)
    for item in range(program, end, tl.num_programs(0)):
        chunk, places = item_at(lora, item, TILES, COLS)
        for first in range(chunk[0], chunk[1], ROWS):
            rows = first + tl.arange(0, ROWS)
            if sends_shrunk(item, TILES):
                send_shrunk(
                    z, row_words, lora, chunk, rows, boxes, slot, epoch, RANK, SIZE, WIDTH, RANKS
                )  # fmt: skip
            for rank in tl.static_range(SIZE):
                if rank != RANK:
                    _, at, mask = rows_from(
                        first, chunk[1], row_words, rank * SHARE + places, ROWS
                    )  # fmt: skip
                    word = tl.load(z + at, mask=mask, other=0)
                    send(boxes.addresses, rank, slot + at, word, epoch, mask)
    mailbox = tl.load(boxes.addresses + RANK).to(tl.pointer_type(tl.int64)) + half
    for item in range(program, end, tl.num_programs(0)):
        chunk, places = item_at(lora, item, TILES, COLS)
        for first in range(chunk[0], chunk[1], ROWS):
            rows, at, mask = rows_from(first, chunk[1], row_words, RANK * SHARE + places, ROWS)
            low, high = summed_with_delta(
                z, row_words, lora, chunk, rows, at, mask, B_FIRST + places, boxes, mailbox, epoch,
                RANK, SIZE, WIDTH, B_WIDTH, ELEMENT, RANKS,
            )  # fmt: skip
            word = word_of(low, high, False, ELEMENT)
            tl.store(z + at, word, mask=mask)
            for rank in tl.static_range(SIZE):
                if rank != RANK:
                    send(boxes.addresses, rank, slot + at, word, epoch, mask)
    for item in range(program, end, tl.num_programs(0)):
        chunk, places = item_at(lora, item, TILES, COLS)
        for first in range(chunk[0], chunk[1], ROWS):
            for rank in tl.static_range(SIZE):
                if rank != RANK:
                    _, at, mask = rows_from(
                        first, chunk[1], row_words, rank * SHARE + places, ROWS
                    )  # fmt: skip
                    their = mailbox + rank * boxes.slot_words
                    tl.store(z + at, received(their, at, mask, epoch, boxes.alive), mask=mask)
    tl.store(boxes.epochs + program, epoch)


def _tile(columns: int, size: int) -> int:
    """Columns of a rank's tile: half of one in one round, and less where ranks are many, whose shares
    are small. Narrower ones among four had the compiler spill registers."""
    most = max(LEAST_COLUMNS, min(COLUMNS // 2, 2 * COLUMNS // next_power_of_2(size)))
    return tile_columns((0, columns // size), most)


def can_take(
    z: torch.Tensor, columns: int, site: LoRASite, work: WorkList, mailboxes: Mailboxes
) -> bool:
    """Whether `sum_and_expand_in_two` can: for steps that graphs capture, whose shrunk activations are a
    product's and whose adapters have no gains and shifts, and where ranks have equal shares."""
    size = mailboxes.size
    if not fits(z, site, work) or columns % size:
        return False
    if site.slice_starts[-1] not in (columns, columns // size):
        return False
    words = num_words(z.unsqueeze(0))
    return 0 < words <= mailboxes.slot_words and _tile(columns, size) >= LEAST_COLUMNS


def is_sooner(z: torch.Tensor, columns: int, mailboxes: Mailboxes) -> bool:
    """Whether that takes less time than a sum and an expand: see `triton_sum_expand.is_sooner`."""
    tiles = cdiv(z.shape[0], ROWS) * (columns // mailboxes.size // _tile(columns, mailboxes.size))
    return tiles <= triton_exchange.PROGRAMS and z.shape[1] - columns <= MOST_COLUMNS


def sum_and_expand_in_two(
    z: torch.Tensor, columns: int, site: LoRASite, work: WorkList, mailboxes: Mailboxes
) -> torch.Tensor:
    """z [T, N + W] of all ranks, which is lost -> [T, N], N = `columns`: the sums of its first columns,
    with the delta of the sums of the others, which are an `Expand`'s h. Of rows in no chunk anything.
    The site's B has all N columns, or the share of this rank."""
    launch(
        _sum_and_expand_in_two,
        (triton_exchange.PROGRAMS,),
        (z, z.shape[1] // 2, mailboxes.packed.value),
        packed(site, z[:, columns:].unsqueeze(0), work),
        RANK=mailboxes.rank,
        SIZE=mailboxes.size,
        WIDTH=columns,
        B_WIDTH=site.slice_starts[-1],
        ELEMENT=ELEMENTS[z.dtype],
        ROWS=ROWS,
        COLS=_tile(columns, mailboxes.size),
        RANKS=RANKS,
        num_warps=triton_exchange.WARPS,
    )
    return z[:, :columns]
