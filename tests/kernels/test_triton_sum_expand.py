"""A sum over ranks that adds the delta: as the sum, and then the twin's expand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("loramux.kernels.triton_exchange")

from exchange_ranks import (
    empty_memory,
    in_process_of_each,
    mailboxes,
    on_stream_of_each,
    set_back,
    set_small,
)
from kernel_cases import assert_close
from sum_expand_turns import (
    SLOT_WORDS,
    TURNS,
    case_of,
    expected,
    found,
    own,
    take_turns,
)
from work_lists import make_case

from loramux.parallel.exchange import Exchange


@pytest.mark.parametrize("size", [2, 3])
def test_as_a_sum_and_an_expand(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_back(monkeypatch)
    if torch.cuda.is_available():
        set_small(round_bytes=1 << 30)
        memory = empty_memory(size, "cuda", SLOT_WORDS)

        def start(turn: int, rank: int) -> Any:
            return lambda by: found(by, turn % len(TURNS), rank, "cuda").clone()

        # Often: threads that look for the same word need not see it come at once.
        answers = on_stream_of_each(memory, 20 * len(TURNS), start)
    else:
        memory = empty_memory(size, "cpu", SLOT_WORDS).share_memory_()
        raw = in_process_of_each(size, take_turns, memory)
        answers = [[torch.from_numpy(one) for one in of_rank] for of_rank in raw]
    wanted_of = [expected(turn, size) for turn in range(len(TURNS))]
    for of_rank in answers:
        for turn, one in enumerate(of_rank):
            turn %= len(TURNS)
            wanted, counts = wanted_of[turn]
            actual = one.cpu().to(TURNS[turn][0])
            assert_close(actual[counts], wanted[counts], steps=2.0, floor=1e-4)


def test_what_is_taken() -> None:
    exchange = Exchange(mailboxes(0, empty_memory(2, words=SLOT_WORDS)))
    case = case_of(0)
    z, site, work = own(case, 0, 0), case.site, case.work

    def takes(z: torch.Tensor = z, **changes: Any) -> bool:
        return exchange.can_take_delta(z, site, replace(work, **changes))

    assert takes()
    assert not takes(affine=True)
    assert not takes(rows_per_chunk=64)
    assert not takes(z.float())
    assert not takes(z[:, :-1].contiguous())  # half a word
    assert not takes(z[:, :-2])  # not in one piece
    assert not takes(z.repeat(5, 1))  # more than a slot holds
    narrow = replace(site, b=site.b[:, :90].contiguous(), slice_starts=(0, 90), affine=None)
    assert not exchange.can_take_delta(z, narrow, work)  # no tile is wide enough
    wide = replace(site, a=site.a.float(), b=site.b.float(), affine=site.affine.float())
    assert not exchange.can_take_delta(z, wide, work)


def test_what_is_sooner_as_one() -> None:
    exchange = Exchange(mailboxes(0, empty_memory(2, words=1 << 19)))
    adapters = [(0, 16), (16, 16)]
    case = make_case((0, 4096), adapters, [(0, 3, [0])], 3, dtype=torch.bfloat16, rows_per_chunk=8)
    work = replace(case.work, affine=False)

    def is_sooner(tokens: int, columns: int) -> bool:
        z = torch.zeros(tokens, 4096 + columns, dtype=torch.bfloat16)
        assert exchange.can_take_delta(z, case.site, work)
        return exchange.takes_delta(z, case.site, work)

    assert is_sooner(1, 16) and is_sooner(64, 512) and is_sooner(128, 16)
    assert not is_sooner(129, 16)  # more tiles than programs
    assert not is_sooner(8, 1024)  # many adapters
