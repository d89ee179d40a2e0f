"""Sums and gathers through mailboxes, on a GPU or in Triton's interpreter; the twin is what torch makes
of all ranks' tensors."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton_exchange = pytest.importorskip("loramux.kernels.triton_exchange")

from exchange_ranks import (  # noqa: E402
    PATIENCE_S,
    SLOT_WORDS,
    Case,
    empty_memory,
    in_processes,
    mailboxes,
    make_turns,
    on_streams,
    set_back,
    set_small,
    set_up_ranks,
)

from loramux.parallel.exchange import Exchange  # noqa: E402


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    set_back(monkeypatch)


@pytest.mark.parametrize(
    "size, epoch, round_bytes",
    [(2, 0, 1 << 30), (3, 0, 1 << 30), (2, -2, 1 << 30), (2, 0, -1), (3, 0, 0), (4, 0, 0)],
    ids=["2", "3", "2-wraps", "2-in-two", "3-in-two", "4-in-two"],
)
def test_all_ranks_get_what_torch_makes_of_all(size: int, epoch: int, round_bytes: int) -> None:
    """One after the other, in many sizes; in one case the count of epochs passes zero."""
    largest = Case(torch.float32, (1, SLOT_WORDS * size // 2), 0)
    turns = [largest, *make_turns(12), largest]
    if torch.cuda.is_available():
        set_small(round_bytes)
        answers = on_streams(size, turns, epoch)
    else:
        answers = in_processes(size, turns, epoch, round_bytes)
    for of_rank in answers:
        for turn, (case, found) in enumerate(zip(turns, of_rank, strict=True)):
            wanted = case.expected(size, turn)
            assert torch.equal(found.view(wanted.shape), wanted), (turn, case)


def test_nobody_waits_once_it_is_abandoned() -> None:
    set_small(round_bytes=0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = empty_memory(2, device)
    boxes = mailboxes(0, memory)
    exchange = Exchange(boxes)
    own, out = torch.ones(1, 64, device=device), torch.empty(64, device=device)
    done = threading.Event()

    def wait() -> None:
        exchange.sum(own, out)
        if device == "cuda":
            torch.cuda.current_stream().synchronize()
        done.set()

    boxes.alive.zero_()
    wait()  # compiled and loaded, and nobody waits
    boxes.alive.fill_(1)
    done.clear()
    threading.Thread(target=wait, daemon=True).start()
    assert not done.wait(2), "the other rank never came"
    exchange.abandon()
    assert done.wait(PATIENCE_S)


@pytest.mark.parametrize(
    "parts, sums, taken",
    [
        (torch.zeros(1, SLOT_WORDS), True, True),
        (torch.zeros(1, SLOT_WORDS + 1), True, False),
        (torch.zeros(2, SLOT_WORDS), True, True),
        (torch.zeros(1, 3, dtype=torch.bfloat16), True, False),  # half a word
        (torch.zeros(3, dtype=torch.bfloat16)[1:].view(1, 2), True, False),  # words are not aligned
        (torch.zeros(2, 4, dtype=torch.bfloat16), True, False),
        (torch.zeros(1, 4, dtype=torch.int32), True, False),
        (torch.zeros(1, 4, dtype=torch.int32), False, True),
        (torch.zeros(1, 4, dtype=torch.int64), False, False),
        (torch.zeros(1, 4, 4)[:, :, ::2], True, False),
        (torch.zeros(1, 4, 8)[:, :, 2:], True, True),
        (torch.zeros(1, 4, 8, dtype=torch.bfloat16)[:, :, 2:], False, True),
        (torch.zeros(1, 4, 9, dtype=torch.bfloat16)[:, :, 1:], True, False),  # rows out of step
        (torch.zeros(1, 4, 8, dtype=torch.bfloat16)[:, :, 1:], True, False),  # half a word a row
        (torch.zeros(2, 4, 8)[:, :, 2:], True, False),
        (torch.zeros(1, 0), True, False),
    ],
)
def test_what_is_exchanged(parts: torch.Tensor, sums: bool, taken: bool) -> None:
    assert Exchange(mailboxes(0, empty_memory(2))).takes(parts, sums=sums) is taken


def test_two_rounds_are_for_what_they_save() -> None:
    """A round's bytes, of 4 KB to 4 MB among 2 to 8 ranks; and what no slot would hold."""

    def rounds(size: int, kilobytes: int, slot_words: int = 1 << 20) -> bool:
        boxes = replace(mailboxes(0, empty_memory(2)), size=size, slot_words=slot_words)
        return bool(triton_exchange.in_two_rounds(256 * kilobytes, boxes))

    assert not any(rounds(2, kilobytes) for kilobytes in (4, 512, 4096))
    assert [rounds(4, kilobytes) for kilobytes in (4, 256, 512)] == [False, False, True]
    assert [rounds(8, kilobytes) for kilobytes in (4, 64, 128)] == [False, False, True]
    assert rounds(4, 256, slot_words=256 * 255)


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks would need GPUs of their own")
@pytest.mark.parametrize("trouble", ["", "far", "closed", "garbled"])
def test_all_ranks_have_mailboxes_or_none(trouble: str, tmp_path: Path) -> None:
    assert set_up_ranks(trouble, tmp_path / "store") == [not trouble] * 2
