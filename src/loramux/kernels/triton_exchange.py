"""Sums and gathers of small tensors over GPUs that can write into each other's memory.

Each rank writes what it has into a slot of every other rank's mailbox, and reads its own mailbox:

    rank 0   x ──┬────────────────────┐            mailbox of rank 1: [half, slot of rank 0, words]
                 │ own numbers        └─ write ──► 64 bits at a time: 32 of data, 32 of the epoch
    rank 1   x ──┴──► sum or gather ◄── read until every word has this epoch

A word and its epoch are stored at once, so what has the right epoch has come, and there is neither a
fence nor a signal to wait for: the way of the "LL" protocol of NCCL. An epoch is an exchange; they use
the halves of the mailbox in turn. Nobody overwrites what another still reads: whoever is two epochs
further has had every rank's message of the epoch between, which each sends when it has read this one.
The epoch is kept on the GPU, so captured graphs may be replayed in any order.

Larger sums among more than two ranks take two rounds: each rank sums a share of the words, and sends
it to all. That is 2 (N - 1) / N messages instead of N - 1, and a message's way more.
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels.triton_delta import rounded
from loramux.kernels.triton_launch import Known, cdiv, facts_of, launch, wait

PROGRAMS = 256
"""Of every exchange, whatever its size, each counting epochs: two a processor beat one from 2 MB on."""

WORDS, WARPS = 1024, 8
"""Words that a program sends at a time, and its warps."""

_THREADS = tl.constexpr(32 * WARPS)

ROUND_BYTES = 450_000
"""Bytes that are sent while a message is on its way: sums go in two rounds where that saves more. On
two H100s an exchange takes 3 us and 7 more for each megabyte."""

ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""What can be summed; anything of 2 or 4 bytes can be gathered."""


@dataclass(frozen=True)
class Mailboxes:
    """Where the ranks of a group write to each other, as one of them sees it."""

    rank: int
    size: int
    addresses: torch.Tensor
    """Of each rank's mailbox, int64 [N]: [2, N, slot_words] of 64 bits each, zeros at first."""

    epochs: torch.Tensor
    """Exchanges so far, int32 [PROGRAMS]; on all ranks the same."""

    alive: torch.Tensor
    """int32 [1]; once 0 nobody waits any more, and what comes out is anything."""

    slot_words: int

    @cached_property
    def packed(self) -> Known:
        boxes = Boxes(self.addresses, self.epochs, self.alive, self.slot_words)
        return Known(boxes, facts_of(boxes))


class Boxes(NamedTuple):
    """`Mailboxes` as a kernel takes them."""

    addresses: torch.Tensor
    epochs: torch.Tensor
    alive: torch.Tensor
    slot_words: int


@triton.jit
def low_number(word, WHOLE: tl.constexpr, ELEMENT: tl.constexpr):
    """The first of the two numbers in a word of 32 bits, or its only one."""
    if WHOLE:
        return word.to(tl.float32, bitcast=True)
    else:
        return (word & 0xFFFF).to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)


@triton.jit
def high_number(word, ELEMENT: tl.constexpr):
    return ((word >> 16) & 0xFFFF).to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)


@triton.jit
def _half(value, ELEMENT: tl.constexpr):
    """The 16 bits of float32 `value` in ELEMENT, as int32."""
    return rounded(value, ELEMENT).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _own(x, at, mask, words, width, stride, PARTS: tl.constexpr):
    """Words of x [PARTS, words], which are summed where there are several: float32. All parts are
    asked for at once; in a loop each would wait for the one before. Rows of `width` words are `stride`
    apart."""
    at = at // width * stride + at % width
    word = tl.load(x + at, mask=mask, other=0)
    if PARTS > 1:
        total = word.to(tl.float32, bitcast=True)
        for part in tl.static_range(1, PARTS):
            more = tl.load(x + part * words + at, mask=mask, other=0)
            total += more.to(tl.float32, bitcast=True)
        word = total.to(tl.int32, bitcast=True)
    return word


@triton.jit
def send(addresses, rank, place, word, epoch, mask):
    """Write words of this epoch to a place in another rank's mailbox."""
    mailbox = tl.load(addresses + rank).to(tl.pointer_type(tl.int64))
    message = (word.to(tl.int64) << 32) | (epoch.to(tl.int64) & 0xFFFFFFFF)
    tl.store(mailbox + place, message, mask=mask)


@triton.jit
def next_epoch(epochs):
    """Of this program; 0 is what was never written."""
    epoch = tl.load(epochs + tl.program_id(0)) + 1
    return tl.where(epoch == 0, 2, epoch)


@triton.jit
def with_word(low, high, word, WHOLE: tl.constexpr, ELEMENT: tl.constexpr):
    """The sums of numbers, with those in a word."""
    low += low_number(word, WHOLE, ELEMENT)
    if not WHOLE:
        high += high_number(word, ELEMENT)
    return low, high


@triton.jit
def word_of(low, high, WHOLE: tl.constexpr, ELEMENT: tl.constexpr):
    """The word of two sums."""
    if WHOLE:
        return low.to(tl.int32, bitcast=True)
    else:
        return _half(low, ELEMENT) | (_half(high, ELEMENT) << 16)


@triton.jit
def received(slot, at, mask, epoch, alive):
    """The words of a slot, once all are of this epoch; in a program of WARPS."""
    message = tl.load(slot + at, mask=mask, other=0, volatile=True)
    late = tl.sum((mask & (message.to(tl.int32) != epoch)).to(tl.int32))
    while late > 0:
        message = tl.load(slot + at, mask=mask, other=0, volatile=True)
        late = tl.sum((mask & (message.to(tl.int32) != epoch)).to(tl.int32))
        late *= tl.load(alive, volatile=True)
    if at.numel < _THREADS:
        # Several threads asked for each word, only one of them counts above, and it may have been later.
        message = tl.load(slot + at, mask=mask, other=0, volatile=True)
    return (message >> 32).to(tl.int32)


@triton.jit(do_not_specialize=["words", "width", "stride", "run"])
def _exchange(
    x, out, words, width, stride, run, boxes,
    PARTS: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, SUM: tl.constexpr, WHOLE: tl.constexpr,
    ELEMENT: tl.constexpr, SPLIT: tl.constexpr, WORDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x [PARTS, words] of all ranks -> out [words], summed in the order of the ranks, a word being
    one float32, if WHOLE, or two ELEMENTs; or, without SUM, out [words / run, SIZE, run]. SPLIT: a run
    is counted in halves of words. Rows of x have `width` words and are `stride` apart."""
    x = x.to(tl.pointer_type(tl.int32), bitcast=True)
    out = out.to(tl.pointer_type(tl.int16 if SPLIT else tl.int32), bitcast=True)
    wait(EARLY)
    program = tl.program_id(0)
    step = tl.num_programs(0) * WORDS
    epoch = next_epoch(boxes.epochs)
    slot_words = boxes.slot_words
    half = (epoch & 1).to(tl.int64) * SIZE * slot_words
    for begin in range(program * WORDS, words, step):
        at = begin + tl.arange(0, WORDS)
        mask = at < words
        word = _own(x, at, mask, words, width, stride, PARTS)
        for rank in tl.static_range(SIZE):
            if rank != RANK:
                send(boxes.addresses, rank, half + RANK * slot_words + at, word, epoch, mask)
    mailbox = tl.load(boxes.addresses + RANK).to(tl.pointer_type(tl.int64)) + half
    for begin in range(program * WORDS, words, step):
        at = begin + tl.arange(0, WORDS)
        mask = at < words
        low = tl.zeros((WORDS,), tl.float32)
        high = tl.zeros((WORDS,), tl.float32)
        for rank in tl.static_range(SIZE):
            if rank == RANK:
                word = _own(x, at, mask, words, width, stride, PARTS)
            else:
                word = received(mailbox + rank * slot_words, at, mask, epoch, boxes.alive)
            if SUM:
                low, high = with_word(low, high, word, WHOLE, ELEMENT)
            elif SPLIT:
                for place in tl.static_range(2):
                    one = 2 * at + place
                    to = one // run * (SIZE * run) + rank * run + one % run
                    tl.store(out + to, (word >> (16 * place)).to(tl.int16), mask=mask)
            else:
                to = at // run * (SIZE * run) + rank * run + at % run
                tl.store(out + to, word, mask=mask)
        if SUM:
            tl.store(out + at, word_of(low, high, WHOLE, ELEMENT), mask=mask)
    tl.store(boxes.epochs + program, epoch)


@triton.jit(do_not_specialize=["words", "share"])
def _sum_in_two(
    x, out, words, share, boxes,
    PARTS: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr,
    ELEMENT: tl.constexpr, WORDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """As `_exchange` with SUM, `share` words of it on each rank. In the slot of another rank stand its
    numbers of this rank's share, and behind them the sums of its own."""
    x = x.to(tl.pointer_type(tl.int32), bitcast=True)
    out = out.to(tl.pointer_type(tl.int32), bitcast=True)
    wait(EARLY)
    program = tl.program_id(0)
    step = tl.num_programs(0) * WORDS
    epoch = next_epoch(boxes.epochs)
    slot_words = boxes.slot_words
    half = (epoch & 1).to(tl.int64) * SIZE * slot_words
    for begin in range(program * WORDS, share, step):
        at = begin + tl.arange(0, WORDS)
        for rank in tl.static_range(SIZE):
            if rank != RANK:
                mask = (at < share) & (rank * share + at < words)
                word = _own(x, rank * share + at, mask, words, words, words, PARTS)
                send(boxes.addresses, rank, half + RANK * slot_words + at, word, epoch, mask)
    mailbox = tl.load(boxes.addresses + RANK).to(tl.pointer_type(tl.int64)) + half
    for begin in range(program * WORDS, share, step):
        at = begin + tl.arange(0, WORDS)
        mask = (at < share) & (RANK * share + at < words)
        low = tl.zeros((WORDS,), tl.float32)
        high = tl.zeros((WORDS,), tl.float32)
        for rank in tl.static_range(SIZE):
            if rank == RANK:
                word = _own(x, RANK * share + at, mask, words, words, words, PARTS)
            else:
                word = received(mailbox + rank * slot_words, at, mask, epoch, boxes.alive)
            low, high = with_word(low, high, word, WHOLE, ELEMENT)
        total = word_of(low, high, WHOLE, ELEMENT)
        tl.store(out + RANK * share + at, total, mask=mask)
        for rank in tl.static_range(SIZE):
            if rank != RANK:
                send(
                    boxes.addresses, rank, half + RANK * slot_words + share + at, total, epoch, mask
                )
    for begin in range(program * WORDS, share, step):
        at = begin + tl.arange(0, WORDS)
        for rank in tl.static_range(SIZE):
            if rank != RANK:
                mask = (at < share) & (rank * share + at < words)
                slot = mailbox + rank * slot_words + share
                word = received(slot, at, mask, epoch, boxes.alive)
                tl.store(out + rank * share + at, word, mask=mask)
    tl.store(boxes.epochs + program, epoch)


def num_words(parts: torch.Tensor) -> int:
    """32-bit words of one of `parts` [P, ...]; 0 where they do not come out even, or it is no type
    that travels."""
    if parts.element_size() not in (2, 4) or parts.data_ptr() % 4:
        return 0
    size = parts.numel() // parts.shape[0] * parts.element_size()
    return 0 if size % 4 else size // 4


def words_of(parts: torch.Tensor) -> tuple[int, int, int]:
    """(words of one of `parts` [P, ...], words of a row of it, words from one to the next): zeros where
    these do not travel. What is in one piece is one row."""
    words = num_words(parts)
    if parts.is_contiguous():
        return words, words, words
    size = parts.element_size()
    if parts.dim() != 3 or parts.shape[0] != 1 or parts.stride(2) != 1:
        return 0, 0, 0
    width, stride = parts.shape[2] * size, parts.stride(1) * size
    return (0, 0, 0) if width % 4 or stride % 4 else (words, width // 4, stride // 4)


def most_words(mailboxes: Mailboxes, *, sums: bool) -> int:
    """Of a tensor that is summed or gathered; either way a rank sends no more than for a gather."""
    return mailboxes.slot_words * mailboxes.size // 2 if sums else mailboxes.slot_words


def in_two_rounds(words: int, mailboxes: Mailboxes) -> bool:
    """Whether a sum of so many words is."""
    size = mailboxes.size
    saved = 4 * words * (size - 1) * (size - 2) // size
    return saved > ROUND_BYTES or words > mailboxes.slot_words


def exchange_sum(parts: torch.Tensor, out: torch.Tensor, mailboxes: Mailboxes) -> None:
    """out [...] = `parts` [P, ...] of all ranks, summed in float32. P is 1 unless they are float32;
    `out` may be what a single part is."""
    words, *rows = words_of(parts)
    assert 0 < words <= most_words(mailboxes, sums=True), "such a sum does not fit"
    whole, element = parts.element_size() == 4, ELEMENTS[parts.dtype]
    if in_two_rounds(words, mailboxes):
        numbers = (words, cdiv(words, mailboxes.size))
        parts = parts.contiguous()
        _launch(_sum_in_two, parts, out, mailboxes, numbers, WHOLE=whole, ELEMENT=element)
        return
    kind = {"SUM": True, "WHOLE": whole, "ELEMENT": element, "SPLIT": False}
    _launch(_exchange, parts, out, mailboxes, (words, *rows, 1), **kind)


def exchange_gather(parts: torch.Tensor, run: int, out: torch.Tensor, mailboxes: Mailboxes) -> None:
    """out [M, N, run] = of each rank `parts` [P, M * run], summed over P in float32; P is 1 unless
    they are float32."""
    words, *rows = words_of(parts)
    assert 0 < words <= mailboxes.slot_words, "such a gather does not fit"
    per_word = 4 // parts.element_size()
    split = run % per_word != 0
    run = run if split else run // per_word
    kind = {"SUM": False, "WHOLE": True, "ELEMENT": tl.float32, "SPLIT": split}
    _launch(_exchange, parts, out, mailboxes, (words, *rows, run), **kind)


def _launch(
    kernel: Any,
    parts: torch.Tensor,
    out: torch.Tensor,
    mailboxes: Mailboxes,
    numbers: tuple[int, ...],
    **kind: Any,
) -> None:
    launch(
        kernel,
        (PROGRAMS,),
        (parts, out, *numbers),
        mailboxes.packed,
        PARTS=parts.shape[0],
        RANK=mailboxes.rank,
        SIZE=mailboxes.size,
        **kind,
        WORDS=WORDS,
        num_warps=WARPS,
    )
