"""Collectives of a group of ranks, here threads that talk through gloo, against what torch makes of all
ranks' tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from loramux.parallel import ALONE, Group, stripe
from rank_threads import on_all_ranks

SIZE = 3


@pytest.fixture
def on_ranks(tmp_path: Path) -> Callable[[Callable[[Group], torch.Tensor]], list[torch.Tensor]]:
    return partial(on_all_ranks, SIZE, tmp_path / "store")


def _own(rank: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


@pytest.mark.parametrize("parts", [1, 4])
def test_sums_are_over_parts_and_ranks(on_ranks, parts: int) -> None:
    wanted = sum(_own(rank, parts, 5, 2).sum(0) for rank in range(SIZE))
    for found in on_ranks(lambda group: group.sum_parts(_own(group.rank, parts, 5, 2))):
        torch.testing.assert_close(found, wanted)


def test_a_contiguous_tensor_is_summed_in_place(on_ranks) -> None:
    def kept(group: Group) -> torch.Tensor:
        tensor = _own(group.rank, 4)
        assert group.all_reduce(tensor).data_ptr() == tensor.data_ptr()
        return tensor

    wanted = sum(_own(rank, 4) for rank in range(SIZE))
    for found in on_ranks(kept):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("run", [1, 2, 6])
@pytest.mark.parametrize("parts", [1, 2])
def test_runs_of_the_ranks_take_turns(on_ranks, parts: int, run: int) -> None:
    own = [_own(rank, parts, 5, 6).sum(0) for rank in range(SIZE)]  # [T, W] each
    wanted = torch.empty(5, SIZE * 6, dtype=torch.float64)
    for column in range(SIZE * 6):
        turn, within = divmod(column, SIZE * run)
        rank, place = divmod(within, run)
        wanted[:, column] = own[rank][:, turn * run + place]
    for found in on_ranks(lambda group: group.gather_runs(_own(group.rank, parts, 5, 6), run)):
        torch.testing.assert_close(found, wanted)


def test_columns_stand_side_by_side_though_the_last_rank_has_fewer(on_ranks) -> None:
    whole = _own(9, 4, 7)

    def gathered(group: Group) -> torch.Tensor:
        columns = stripe(7, SIZE, group.rank)
        return group.gather_columns(whole[:, columns.slice].contiguous(), columns)

    for found in on_ranks(gathered):
        assert torch.equal(found, whole)


def test_a_gather_has_a_row_for_each_rank(on_ranks) -> None:
    wanted = torch.stack([_own(rank, 2, 3) for rank in range(SIZE)])
    for found in on_ranks(lambda group: group.all_gather(_own(group.rank, 2, 3))):
        assert torch.equal(found, wanted)


def test_alone_everything_is_what_it_was() -> None:
    parts = _own(0, 3, 4, 2)
    assert torch.equal(ALONE.sum_parts(parts.clone()), parts.sum(0))
    assert torch.equal(ALONE.gather_runs(parts[:1], 1), parts[0])
    assert torch.equal(ALONE.gather_columns(parts[0], stripe(2, 1, 0)), parts[0])
    assert torch.equal(ALONE.all_gather(parts), parts.unsqueeze(0))


class _Exchange:
    """Takes sums of float32, and what is gathered of two bytes."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def takes(self, parts: torch.Tensor, *, sums: bool) -> bool:
        return parts.dtype == (torch.float32 if sums else torch.bfloat16)

    def sum(self, parts: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        self.asked.append(f"sum {tuple(parts.shape)}")
        return out

    def gather(self, parts: torch.Tensor, run: int) -> torch.Tensor:
        self.asked.append(f"gather {tuple(parts.shape)} by {run}")
        return parts.new_zeros(parts[0].numel() // run, SIZE, run)


def test_what_an_exchange_takes_goes_through_it(on_ranks) -> None:
    def asked(group: Group) -> torch.Tensor:
        exchange = _Exchange()
        group.exchange = exchange  # type: ignore[assignment]
        group.all_reduce(torch.ones(4, 2))
        group.sum_parts(torch.ones(2, 5))
        assert torch.equal(
            group.all_reduce(torch.ones(4, dtype=torch.int32)), torch.full((4,), SIZE)
        )
        assert group.gather_runs(torch.ones(1, 4, 6).bfloat16(), 2).shape == (4, SIZE * 6)
        assert group.all_gather(torch.ones(4, 6).bfloat16()).shape == (SIZE, 4, 6)
        assert group.all_gather(torch.ones(4, 6)).all()
        assert exchange.asked == [
            "sum (1, 4, 2)",
            "sum (2, 5)",
            "gather (1, 4, 6) by 2",
            "gather (1, 4, 6) by 24",
        ]
        assert group.entered == 7  # and the first, in which all meet
        return torch.ones(1)

    assert len(on_ranks(asked)) == SIZE
