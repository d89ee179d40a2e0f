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
    ROUND_BYTES,
    SLOT_WORDS,
    TURNS,
    case_of,
    expected,
    found,
    own,
    share_of,
    take_turns,
)
from work_lists import make_case, site_to, work_to

from loramux.kernels import LoRASite, triton_exchange
from loramux.parallel.exchange import Exchange


@pytest.mark.parametrize(
    ("kind", "size"), [("one", 2), ("one", 3), ("two", 3), ("two", 4), ("own", 2), ("own", 3)]
)
def test_as_a_sum_and_an_expand(kind: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_back(monkeypatch)
    if torch.cuda.is_available():
        set_small(round_bytes=ROUND_BYTES[kind])
        memory = empty_memory(size, "cuda", SLOT_WORDS)

        def start(turn: int, rank: int) -> Any:
            return lambda by: found(by, turn % len(TURNS), rank, size, kind, "cuda").clone()

        # Often: threads that look for the same word need not see it come at once.
        answers = on_stream_of_each(memory, 20 * len(TURNS), start)
    else:
        memory = empty_memory(size, "cpu", SLOT_WORDS).share_memory_()
        raw = in_process_of_each(size, take_turns, memory, kind)
        answers = [[torch.from_numpy(one) for one in of_rank] for of_rank in raw]
    wanted_of = [expected(turn, size, kind) for turn in range(len(TURNS))]
    for of_rank in answers:
        for turn, one in enumerate(of_rank):
            turn %= len(TURNS)
            wanted, counts = wanted_of[turn]
            actual = one.cpu().to(TURNS[turn][0])
            assert_close(actual[counts], wanted[counts], steps=2.0, floor=1e-4)


@pytest.mark.parametrize("kind", ["one", "two", "own"])
def test_a_step_without_rows_meets_all_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a rank gets two exchanges ahead, and overwrites what another has not read."""
    set_back(monkeypatch)
    set_small(round_bytes=ROUND_BYTES[kind])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = empty_memory(3, device, SLOT_WORDS)
    exchange = Exchange(mailboxes(1, memory))
    exchange.abandon()  # the others never come
    case = case_of(0, 3, kind)
    site = share_of(case.site, 1, 3) if kind == "own" else case.site
    counts, chunks = torch.zeros(2, dtype=torch.int32), torch.zeros_like(case.work.chunks)
    nothing = replace(case.work, counts=counts, chunks=chunks)
    step = (case.site.slice_starts[-1], site_to(site, device), work_to(nothing, device))
    exchange.sum_and_expand(own(case, 0, 1).to(device), *step)
    epochs = (memory[:, 1].cpu() & 0xFFFFFFFF).amax(-1)  # [N, N]: of what a rank has from each
    assert epochs.tolist() == [[0, 1, 0], [0, 0, 0], [0, 1, 0]]


def test_what_is_taken() -> None:
    exchange = Exchange(mailboxes(0, empty_memory(2, words=SLOT_WORDS)))
    case = case_of(0, 2, "own")
    z, site, work = own(case, 0, 0), case.site, case.work
    columns = site.slice_starts[-1]

    def takes(z: torch.Tensor = z, site: LoRASite = site, **changes: Any) -> bool:
        return exchange.can_take_delta(z, columns, site, replace(work, **changes))

    assert takes() and takes(site=share_of(site, 0, 2))
    assert not takes(affine=True)
    assert not takes(rows_per_chunk=64)
    assert not takes(z.float())
    assert not takes(z[:, :-1].contiguous())  # half a word
    assert not takes(z[:, :-2])  # not in one piece
    assert not takes(z.repeat(5, 1))  # more than a slot holds
    assert not takes(site=share_of(site, 0, 3))  # nobody's share
    wide = replace(site, a=site.a.float(), b=site.b.float(), affine=site.affine.float())
    assert not takes(site=wide)


@pytest.mark.parametrize("columns", [90, 96])
def test_no_tile_is_wide_enough(columns: int) -> None:
    """For 90 columns, and for a share of 48 of 96."""
    exchange = Exchange(mailboxes(0, empty_memory(2, words=SLOT_WORDS)))
    case = case_of(0, 2, "one")
    narrow = replace(
        case.site, b=case.site.b[:, :columns].contiguous(), slice_starts=(0, columns), affine=None
    )
    site = narrow if columns == 90 else share_of(narrow, 0, 2)
    z = torch.zeros(8, columns + 16, dtype=site.b.dtype)
    assert not exchange.can_take_delta(z, columns, site, case.work)


@pytest.mark.parametrize(
    ("kind", "size", "most_tokens"), [("one", 2, 128), ("own", 2, 128), ("two", 4, 256)]
)
def test_what_is_sooner_as_one(
    kind: str, size: int, most_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_back(monkeypatch)
    triton_exchange.ROUND_BYTES = ROUND_BYTES[kind]
    exchange = Exchange(mailboxes(0, empty_memory(size, words=1 << 20)))
    adapters = [(0, 16), (16, 16)]
    case = make_case((0, 4096), adapters, [(0, 3, [0])], 3, dtype=torch.bfloat16, rows_per_chunk=8)
    work = replace(case.work, affine=False)
    site = share_of(case.site, 0, size) if kind == "own" else case.site

    def is_sooner(tokens: int, columns: int) -> bool:
        z = torch.zeros(tokens, 4096 + columns, dtype=torch.bfloat16)
        assert exchange.can_take_delta(z, 4096, site, work)
        return exchange.takes_delta(z, 4096, site, work)

    assert is_sooner(1, 16) and is_sooner(64, 512) and is_sooner(most_tokens, 16)
    assert not is_sooner(most_tokens + 1, 16)  # more tiles than programs
    assert not is_sooner(8, 1024)  # many adapters
