"""The policy: adapters stay where they are, unless their replica has far more to do than the others."""

from __future__ import annotations

import random
from collections import Counter

from zipf import lru_hit_rate, trace

from loramux.replicas.affinity import BALANCE, SLACK, first, most_load, ranked

REPLICAS = tuple(f"r{i}" for i in range(10))
IDLE = [0] * len(REPLICAS)
NAMES = [f"adapter-{i}" for i in range(2000)]


def home(name: str, replicas: tuple[str, ...] = REPLICAS) -> str:
    return replicas[first([name], replicas, [0] * len(replicas))]


def test_every_replica_is_in_the_ranking_once() -> None:
    for loads in (IDLE, list(range(0, 1000, 100)), [1000] * 10):
        for members in ([], ["a"], ["a", "b"]):
            assert sorted(ranked(members, REPLICAS, loads)) == list(range(10))
            if members:
                assert first(members, REPLICAS, loads) == ranked(members, REPLICAS, loads)[0]


def test_homes_are_spread_and_only_those_of_a_lost_replica_move() -> None:
    counts = Counter(map(home, NAMES))
    assert len(counts) == 10 and max(counts.values()) < 1.3 * len(NAMES) / 10
    fewer = REPLICAS[:4] + REPLICAS[5:]
    moved = [name for name in NAMES if home(name, fewer) != home(name)]
    assert {home(name) for name in moved} == {"r4"} and len(moved) == counts["r4"]


def test_an_overloaded_home_is_passed_over_for_the_same_next_one() -> None:
    order = ranked(["a"], REPLICAS, IDLE)
    loads = list(IDLE)
    loads[order[0]] = SLACK
    assert ranked(["a"], REPLICAS, loads) == [*order[1:], order[0]]
    loads[order[0]] = SLACK - 1
    assert ranked(["a"], REPLICAS, loads) == order


def test_a_hot_adapter_takes_no_replica_beyond_the_bound() -> None:
    loads = list(IDLE)
    for _ in range(1000):
        index = first(["hot"], REPLICAS, loads)
        assert loads[index] < most_load(loads)
        loads[index] += 1
    assert max(loads) <= BALANCE * 1000 / 10 + 1


def test_a_composition_is_at_home_with_one_of_its_members() -> None:
    for i in range(0, 200, 2):
        pair = NAMES[i : i + 2]
        assert REPLICAS[first(pair, REPLICAS, IDLE)] in {home(pair[0]), home(pair[1])}
        assert first(pair, REPLICAS, IDLE) == first(pair[::-1], REPLICAS, IDLE)


def test_the_base_model_goes_to_the_idlest() -> None:
    loads = [5, 3, 9, 3, 7, 8, 8, 8, 8, 8]
    chosen = {first([], REPLICAS, loads) for _ in range(100)}
    assert chosen == {1, 3}


def test_two_replicas_of_8_places_do_as_well_as_one_cache_of_16() -> None:
    """Whatever the adapters are called, so this is no luck of one set of names."""
    seats, losses, random_losses = ("0", "1"), [], []
    for seed in range(30):
        asked = trace(64, 1500, seed)
        names = [f"{seed}-{i}" for i in range(64)]
        parts: dict[int, list[int]] = {0: [], 1: []}
        anywhere: dict[int, list[int]] = {0: [], 1: []}
        draw = random.Random(seed)
        for adapter in asked:
            parts[first([names[adapter]], seats, [0, 0])].append(adapter)
            anywhere[draw.randrange(2)].append(adapter)
        one = lru_hit_rate([asked], 16)
        losses.append(one - lru_hit_rate(parts.values(), 8))
        random_losses.append(one - lru_hit_rate(anywhere.values(), 8))
    assert sum(losses) / len(losses) < 0.02
    assert sum(random_losses) / len(random_losses) > 0.1
