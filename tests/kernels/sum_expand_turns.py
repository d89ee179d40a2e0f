"""Turns of ranks at a sum that adds the delta, and what should come out."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import torch
from exchange_ranks import mailboxes, set_small
from work_lists import RANKS, SPANS, TOKENS, Case, in_float64, make_case, site_to, work_to

from loramux.kernels import Expand, LoRASite, WorkList, reference
from loramux.parallel.exchange import Exchange

BF16, F16 = torch.bfloat16, torch.float16
SLOT_WORDS = 16384
TURNS = [(BF16, 8, 96), (F16, 16, 128), (BF16, 16, 32), (F16, 8, 32), (BF16, 8, 96)]
"""Type, rows of a chunk, and columns of the product, or of a rank's share of them."""

ROUND_BYTES = {"one": 1 << 30, "two": 0, "own": 0}
"""In one round; in two; in two, and each rank has B of its own share alone."""


def case_of(turn: int, size: int, kind: str) -> Case:
    dtype, rows, width = TURNS[turn]
    torch.manual_seed(turn)
    width *= 1 if kind == "one" else size
    case = make_case((0, width), RANKS, SPANS, TOKENS, dtype=dtype, rows_per_chunk=rows)
    return replace(case, work=_without_affine(case.work))


def _without_affine(work: WorkList) -> WorkList:
    chunks = work.chunks.clone()
    chunks[:, 7] %= 1 << 16
    return replace(work, chunks=chunks, member_ranks=work.member_ranks % (1 << 16), affine=False)


def own(case: Case, turn: int, rank: int) -> torch.Tensor:
    """z [T, N + W] of a rank; what no adapter's columns hold is NaN there."""
    dice = torch.Generator().manual_seed(31 * turn + rank)
    width, more = case.site.slice_starts[-1], case.width + case.width % 2
    z = torch.randn(TOKENS, width + more, generator=dice).to(case.site.b.dtype)
    nobodys = torch.zeros(more, dtype=torch.bool)
    nobodys[: case.width] = case.expand.h[0].isnan().all(0)
    z[:, width:][:, nobodys] = float("nan")
    return z


def expected(turn: int, size: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, N] in float64, and which rows count."""
    case = case_of(turn, size, kind)
    width, dtype = case.site.slice_starts[-1], case.site.b.dtype
    z = own(case, turn, 0).float()  # [T, N + W]
    for rank in range(1, size):
        z += own(case, turn, rank).float()
    z = z.to(dtype)
    y = z[:, :width].double()
    expand = Expand(case.site, z[:, width:].unsqueeze(0), case.work)
    reference.lora_expand(y, in_float64(expand))
    return y, case.touched


def share_of(site: LoRASite, rank: int, size: int) -> LoRASite:
    """With B of this rank's columns."""
    share = site.slice_starts[-1] // size
    own = slice(rank * share, (rank + 1) * share)
    affine = None if site.affine is None else site.affine[..., own].contiguous()
    b = site.b[:, own].contiguous()
    return replace(site, b=b, slice_starts=(0, share), affine=affine)


def found(
    exchange: Exchange, turn: int, rank: int, size: int, kind: str, device: str
) -> torch.Tensor:
    case = case_of(turn, size, kind)
    site, columns = case.site, case.site.slice_starts[-1]
    site = site_to(share_of(site, rank, size) if kind == "own" else site, device)
    work, z = work_to(case.work, device), own(case, turn, rank).to(device)
    assert exchange.can_take_delta(z, columns, site, work)
    return exchange.sum_and_expand(z, columns, site, work)


def take_turns(rank: int, memory: torch.Tensor, kind: str) -> list[Any]:
    set_small(round_bytes=ROUND_BYTES[kind])
    exchange, dice = Exchange(mailboxes(rank, memory)), random.Random(rank)
    answers = []
    for turn in range(len(TURNS)):
        time.sleep(dice.choice([0, 0, 0.01]))
        answers.append(found(exchange, turn, rank, len(memory), kind, "cpu").float().numpy().copy())
    return answers
