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
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels.triton_launch import early, wait

PROGRAMS = 128
"""Programs of every exchange, whatever its size: each counts epochs by itself."""

WORDS, WARPS = 1024, 8
"""Words that a program sends at a time, and its warps."""

ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""What can be summed; anything of 2 or 4 bytes can be gathered."""


@dataclass(frozen=True, slots=True)
class Mailboxes:
    """Where the ranks of a group write to each other; all but `rank` is the same on all of them, and
    all but `epochs` begins as zeros."""

    rank: int
    size: int
    addresses: torch.Tensor
    """Of each rank's mailbox, int64 [N]: [2, N, slot_words] of 64 bits each."""

    epochs: torch.Tensor
    """Exchanges so far, int32 [PROGRAMS]."""

    alive: torch.Tensor
    """int32 [1]; once 0 nobody waits any more, and what comes out is anything."""

    slot_words: int


@triton.jit
def _low(word, WHOLE: tl.constexpr, ELEMENT: tl.constexpr):
    """The first of the two numbers in a word of 32 bits, or its only one."""
    if WHOLE:
        return word.to(tl.float32, bitcast=True)
    else:
        return (word & 0xFFFF).to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)


@triton.jit
def _high(word, ELEMENT: tl.constexpr):
    return ((word >> 16) & 0xFFFF).to(tl.int16).to(ELEMENT, bitcast=True).to(tl.float32)


@triton.jit
def _half(value, ELEMENT: tl.constexpr):
    """The 16 bits of float32 `value` in ELEMENT, as int32."""
    return value.to(ELEMENT).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _own(x, at, mask, words, parts):
    """Words of x [parts, words], which are summed where there are several: float32."""
    word = tl.load(x + at, mask=mask, other=0)
    if parts > 1:
        total = word.to(tl.float32, bitcast=True)
        for part in range(1, parts):
            more = tl.load(x + part * words + at, mask=mask, other=0)
            total += more.to(tl.float32, bitcast=True)
        word = total.to(tl.int32, bitcast=True)
    return word


@triton.jit
def _received(slot, at, mask, epoch, alive):
    """The words of a slot, once all are of this epoch."""
    message = tl.load(slot + at, mask=mask, other=0, volatile=True)
    late = tl.sum((mask & (message.to(tl.int32) != epoch)).to(tl.int32))
    while late > 0:
        message = tl.load(slot + at, mask=mask, other=0, volatile=True)
        late = tl.sum((mask & (message.to(tl.int32) != epoch)).to(tl.int32))
        late *= tl.load(alive, volatile=True)
    return (message >> 32).to(tl.int32)


@triton.jit(do_not_specialize=["words", "parts", "run"])
def _exchange(
    x, out, addresses, epochs, alive, words, parts, run, slot_words,
    RANK: tl.constexpr, SIZE: tl.constexpr, SUM: tl.constexpr, WHOLE: tl.constexpr,
    ELEMENT: tl.constexpr, SPLIT: tl.constexpr, WORDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x [parts, words] of all ranks -> out [words], summed in the order of the ranks, a word being
    one float32, if WHOLE, or two ELEMENTs; or, without SUM, out [words / run, SIZE, run]. SPLIT: a run
    is counted in halves of words."""
    wait(EARLY)
    program = tl.program_id(0)
    step = tl.num_programs(0) * WORDS
    epoch = tl.load(epochs + program) + 1
    epoch = tl.where(epoch == 0, 2, epoch)  # what was never written has epoch 0
    half = (epoch & 1).to(tl.int64) * SIZE * slot_words
    for begin in range(program * WORDS, words, step):
        at = begin + tl.arange(0, WORDS)
        mask = at < words
        word = _own(x, at, mask, words, parts).to(tl.int64)
        message = (word << 32) | (epoch.to(tl.int64) & 0xFFFFFFFF)
        for rank in tl.static_range(SIZE):
            if rank != RANK:
                mailbox = tl.load(addresses + rank).to(tl.pointer_type(tl.int64))
                tl.store(mailbox + half + RANK * slot_words + at, message, mask=mask)
    mailbox = tl.load(addresses + RANK).to(tl.pointer_type(tl.int64)) + half
    for begin in range(program * WORDS, words, step):
        at = begin + tl.arange(0, WORDS)
        mask = at < words
        low = tl.zeros((WORDS,), tl.float32)
        high = tl.zeros((WORDS,), tl.float32)
        for rank in tl.static_range(SIZE):
            if rank == RANK:
                word = _own(x, at, mask, words, parts)
            else:
                word = _received(mailbox + rank * slot_words, at, mask, epoch, alive)
            if SUM:
                low += _low(word, WHOLE, ELEMENT)
                if not WHOLE:
                    high += _high(word, ELEMENT)
            elif SPLIT:
                for place in tl.static_range(2):
                    one = 2 * at + place
                    to = one // run * (SIZE * run) + rank * run + one % run
                    tl.store(out + to, (word >> (16 * place)).to(tl.int16), mask=mask)
            else:
                to = at // run * (SIZE * run) + rank * run + at % run
                tl.store(out + to, word, mask=mask)
        if SUM:
            if WHOLE:
                total = low.to(tl.int32, bitcast=True)
            else:
                total = _half(low, ELEMENT) | (_half(high, ELEMENT) << 16)
            tl.store(out + at, total, mask=mask)
    tl.store(epochs + program, epoch)


def num_words(tensor: torch.Tensor) -> int:
    """32-bit words of it; 0 where they do not come out even, or it is no type that travels."""
    if tensor.element_size() not in (2, 4) or tensor.data_ptr() % 4:
        return 0
    size = tensor.numel() * tensor.element_size()
    return 0 if size % 4 else size // 4


def exchange_sum(parts: torch.Tensor, out: torch.Tensor, mailboxes: Mailboxes) -> None:
    """out [...] = `parts` [P, ...] of all ranks, summed in float32. P is 1 unless they are float32;
    `out` may be what a single part is."""
    element = ELEMENTS[parts.dtype]
    _launch(parts, out.view(-1).view(torch.int32), 1, mailboxes, sums=True, element=element)


def exchange_gather(parts: torch.Tensor, run: int, out: torch.Tensor, mailboxes: Mailboxes) -> None:
    """out [M, N, run] = of each rank `parts` [P, M * run], summed over P in float32; P is 1 unless
    they are float32."""
    per_word = 4 // parts.element_size()
    split = run % per_word != 0
    flat = out.view(-1).view(torch.int16 if split else torch.int32)
    _launch(parts, flat, run if split else run // per_word, mailboxes, split=split)


def _launch(
    parts: torch.Tensor,
    out: torch.Tensor,
    run: int,
    mailboxes: Mailboxes,
    *,
    sums: bool = False,
    element: Any = tl.float32,
    split: bool = False,
) -> None:
    words = num_words(parts[0])
    assert 0 < words <= mailboxes.slot_words, "such a message does not fit into a mailbox"
    _exchange[(PROGRAMS,)](
        parts.view(-1).view(torch.int32),
        out,
        mailboxes.addresses,
        mailboxes.epochs,
        mailboxes.alive,
        words,
        parts.shape[0],
        run,
        mailboxes.slot_words,
        mailboxes.rank,
        mailboxes.size,
        sums,
        parts.element_size() == 4,
        element,
        split,
        WORDS,
        **early(parts.device),
        num_warps=WARPS,
    )
