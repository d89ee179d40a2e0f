"""Turns between tenants, apart from everything that a scheduler adds."""

from __future__ import annotations

import random
from itertools import count

import pytest

from loramux.engine import fair_share
from loramux.engine.fair_share import FairShare
from loramux.engine.giving_way import gives_seat, had_turn, may_take_seat
from loramux.engine.sequence import Sequence
from loramux.types import Request, SamplingParams

IDS = count()


def sequence(*names: str, prompt: int = 10, at: float = 0.0) -> Sequence:
    request = Request("r", (1,) * prompt, SamplingParams(), tenants=tuple(sorted(names)))
    return Sequence(next(IDS), request, 0, 0, queued_at=at)


def add(fair: FairShare, *names: str, prompt: int = 10, at: float = 0.0) -> Sequence:
    added = sequence(*names, prompt=prompt, at=at)
    fair.enter(added)
    fair.queue(added)
    return added


def serve(fair: FairShare, most: int, prefills: list[Sequence] | None = None) -> list[Sequence]:
    """Start up to `most` in order of their turns, each with its whole prompt."""
    started = []
    with fair.turns(prefills or []) as turns:
        for found in turns:
            if len(started) == most:
                break
            if turns.waits:
                fair.unqueue(found)
            fair.charge(found, found.num_tokens)
            started.append(found)
    return started


def served(fair: FairShare) -> dict[str, int]:
    return {tenant.name: tenant.tokens for tenant in fair.standing()}


def test_one_tenant_is_first_come_first_served() -> None:
    fair = FairShare()
    dice = random.Random(1)
    added = [add(fair, "a", at=dice.random()) for _ in range(40)]
    by_age = sorted(added, key=lambda s: s.queued_at)
    running = by_age[-3:]
    for late in running:
        fair.unqueue(late)
    assert serve(fair, 5, running) == [*running, *by_age[:2]], "those that run come first"
    assert serve(fair, 100) == by_age[2:-3]


def test_tenants_take_turns_in_order_of_age_where_they_are_equal() -> None:
    fair = FairShare()
    first = [add(fair, "a", at=i) for i in range(6)]
    then = [add(fair, "b", at=10 + i) for i in range(2)]
    base = [add(fair, at=5.5)]
    assert serve(fair, 9) == [first[0], *base, then[0], first[1], then[1], *first[2:]]


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_tokens_go_by_weights_whatever_the_prompts(weight: float) -> None:
    fair = FairShare(lambda name: weight if name == "a" else 1.0)
    dice = random.Random(7)
    for _ in range(4000):
        add(fair, "a", prompt=dice.randint(1, 30))
    for _ in range(800):
        add(fair, "b", prompt=dice.randint(1, 300))
    serve(fair, 1500)
    tokens = served(fair)
    assert tokens["a"] / tokens["b"] == pytest.approx(weight, rel=0.1)


def test_an_idle_tenant_saves_nothing_up_and_keeps_what_it_owes() -> None:
    fair = FairShare()
    early = add(fair, "idle", prompt=1)
    for i in range(50):
        add(fair, "busy", prompt=100, at=i)
    assert serve(fair, 1) == [early]
    fair.leave(early)
    serve(fair, 20)
    back = [add(fair, "idle", prompt=100, at=100 + i) for i in range(10)]
    order = serve(fair, 8)
    assert sum(s in back for s in order) == 4, "it shares from now on, and no more than that"


def test_who_comes_after_all_have_left_owes_no_more_than_they() -> None:
    fair = FairShare()
    for _ in range(10):
        alone = add(fair, "a", prompt=1000)
        serve(fair, 1)
        fair.leave(alone)
    fair.check_integrity()
    for i in range(10):
        add(fair, "b", prompt=100, at=i)
        add(fair, "a", prompt=100, at=i)
    before = served(fair)["a"]
    serve(fair, 10)
    assert served(fair)["a"] - before == 500


def test_a_sum_waits_for_the_one_that_was_served_most() -> None:
    fair = FairShare()
    add(fair, "a", prompt=500)
    both = add(fair, "a", "b", prompt=10, at=0.5)
    others = [add(fair, "c", prompt=100, at=1 + i) for i in range(6)]
    order = serve(fair, 7)
    assert order.index(both) == 6 and order[1:6] == others[:5]
    assert served(fair) == {"a": 510, "b": 10, "c": 500}


def test_what_is_computed_again_is_not_charged_again() -> None:
    fair = FairShare()
    one = add(fair, "a", prompt=10)
    for end in (4, 10, 11, 3, 11, 12):
        fair.charge(one, end)
    assert served(fair)["a"] == 12


def test_small_prompts_of_others_have_their_part_of_the_budget() -> None:
    fair = FairShare()
    long = add(fair, "a", prompt=10_000)
    add(fair, "b", prompt=20, at=1)
    add(fair, "b", prompt=20, at=2)
    add(fair, "c", prompt=333, at=3)
    add(fair, "d", prompt=250, at=4)
    with fair.turns([]) as turns:
        assert next(turns) is long
        assert turns.kept_for_others(long, 1000) == 20 + 250, "a quarter each; b's next one"
        turns.closed = True
        assert turns.kept_for_others(long, 1000) == 0


def test_what_is_put_back_during_a_walk_does_not_come_again() -> None:
    fair = FairShare()
    victim = add(fair, "a")
    serve(fair, 1)
    other = add(fair, "b")
    seen = []
    with fair.turns([]) as turns:
        for found in turns:
            seen.append(found)
            if found is other:
                fair.queue(victim)
    assert seen == [other]
    assert set(serve(fair, 5)) == {victim, other}


def test_tenants_that_are_gone_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_share, "MOST_IDLE", 10)
    fair = FairShare()
    stays = add(fair, "stays")
    for number in range(200):
        one = add(fair, f"t{number}")
        fair.unqueue(one)
        fair.leave(one)
        assert len(fair.standing()) <= 13
    assert "stays" in served(fair)
    fair.unqueue(stays)
    fair.leave(stays)
    fair.check_integrity()


def test_seats_are_taken_below_the_share_from_those_above_it() -> None:
    fair = FairShare(lambda name: 2.0 if name == "heavy" else 1.0)
    running: dict[Sequence, None] = {}
    for _ in range(8):
        running[add(fair, "a", prompt=100)] = None
    serve(fair, 8)
    quiet = add(fair, "q")
    youngest = list(running)[-1]
    assert may_take_seat(fair, quiet, 8), "four of eight"
    assert gives_seat(fair, running, 8, behind=0.0, now=1.0) is youngest
    assert gives_seat(fair, running, 8, behind=1e9, now=1.0) is None, "was served more itself"
    youngest.given_way = 1
    assert not had_turn(youngest)
    assert gives_seat(fair, running, 8, behind=0.0, now=1.0) is list(running)[-2]
    youngest.tokens += [1] * 8
    assert had_turn(youngest)
    youngest.tokens += [1] * 1000
    youngest.num_output_at_admission = 990
    assert not had_turn(youngest), "a longer one has a longer turn"
    add(fair, "heavy")
    assert fair.seats(quiet.group.tenants[0], 8) == 2  # type: ignore[union-attr]
    for _ in range(2):
        fair.unqueue(add(fair, "q"))
    assert not may_take_seat(fair, quiet, 8), "two of its own run"
