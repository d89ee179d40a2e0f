"""Sums and gathers through mailboxes, on a GPU or in Triton's interpreter; the twin is what torch makes
of all ranks' tensors."""

from __future__ import annotations

import threading

import pytest
import torch

triton_exchange = pytest.importorskip("loramux.kernels.triton_exchange")

from exchange_ranks import (  # noqa: E402
    PATIENCE_S,
    PROGRAMS,
    SLOT_WORDS,
    WORDS,
    empty_memory,
    in_processes,
    mailboxes,
    make_turns,
    on_streams,
)

from loramux.parallel.exchange import Exchange  # noqa: E402


@pytest.mark.parametrize("size, epoch", [(2, 0), (3, 0), (2, -4)], ids=["2", "3", "2-wraps"])
def test_all_ranks_get_what_torch_makes_of_all(
    size: int, epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, in many sizes; in the last case the count of epochs passes zero."""
    turns = make_turns(30)
    if torch.cuda.is_available():
        monkeypatch.setattr(triton_exchange, "PROGRAMS", PROGRAMS)
        monkeypatch.setattr(triton_exchange, "WORDS", WORDS)
        answers = on_streams(size, turns, epoch)
    else:
        answers = in_processes(size, turns, epoch)
    for of_rank in answers:
        for turn, (case, found) in enumerate(zip(turns, of_rank, strict=True)):
            wanted = case.expected(size, turn)
            assert torch.equal(found.view(wanted.shape), wanted), (turn, case)


def test_nobody_waits_once_it_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_exchange, "PROGRAMS", PROGRAMS)
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
        (torch.zeros(1, 0), True, False),
    ],
)
def test_what_is_exchanged(parts: torch.Tensor, sums: bool, taken: bool) -> None:
    assert Exchange(mailboxes(0, empty_memory(2))).takes(parts, sums=sums) is taken
