"""The routing of replicas, carried to a fleet: python bench/fleet.py [--output bench/results]

Poisson requests with zipf adapters come to replicas that answer each after an exponential time and
keep the least recently used adapters in their places. Replicas are chosen by loramux's own policy
(loramux.replicas.affinity), by which of them has the adapter (as Ray Serve's own multiplexing does),
at random, or in turn; `one cache` is what a single replica with all places would hit. All see the
true loads and places at once; a router of Ray Serve knows them a little later.
No model runs, so this says where adapters are, not how fast tokens come.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loramux.bench.report import append_row, header, result_path, write_results
from loramux.replicas.affinity import first

WARM_UP = 0.2  # share of the requests that is not counted: the places are empty at first


@dataclass(frozen=True, slots=True)
class Fleet:
    """`rate` in requests a second, `service_s` the mean time of one answer."""

    replicas: int = 100
    adapters: int = 10_000
    places: int = 32
    requests: int = 300_000
    rate: float = 2_000.0
    service_s: float = 2.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """`busiest` and `longest`: of all replicas, the most requests served and the longest queue seen,
    over the mean of all; `stays`: requests that went where most of their adapter's went."""

    policy: str
    zipf: float
    hit_rate: float
    stays: float
    busiest: float
    longest: float
    loads_s: float


class Places:
    """The adapters that one replica holds, least recently used first."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._held: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, adapter: int) -> bool:
        return adapter in self._held

    def __len__(self) -> int:
        return len(self._held)

    def use(self, adapter: int) -> bool:
        """Whether it was there; now it is."""
        hit = adapter in self._held
        self._held[adapter] = None
        self._held.move_to_end(adapter)
        if len(self._held) > self._number:
            self._held.popitem(last=False)
        return hit


Choose = Callable[[int, Sequence[int]], int]  # (adapter, loads of the replicas) -> replica


def by_affinity(fleet: Fleet, places: Sequence[Places]) -> Choose:
    names = [f"adapter-{i}" for i in range(fleet.adapters)]
    seats = tuple(str(i) for i in range(fleet.replicas))
    return lambda adapter, loads: first((names[adapter],), seats, loads)


def at_random(fleet: Fleet, places: Sequence[Places]) -> Choose:
    draw = random.Random(fleet.seed + 1)
    return lambda adapter, loads: draw.randrange(fleet.replicas)


def in_turn(fleet: Fleet, places: Sequence[Places]) -> Choose:
    turns = itertools.count()
    return lambda adapter, loads: next(turns) % fleet.replicas


def by_presence(fleet: Fleet, places: Sequence[Places]) -> Choose:
    """Ray Serve's default for multiplexed models, with all it would like to know: the less loaded of
    two that have the adapter, otherwise of two that have the fewest."""
    draw = random.Random(fleet.seed + 1)

    def choose(adapter: int, loads: Sequence[int]) -> int:
        having = [i for i, place in enumerate(places) if adapter in place]
        fewest = min(map(len, places))
        among = having or [i for i, place in enumerate(places) if len(place) == fewest]
        return min(draw.sample(among, min(2, len(among))), key=lambda i: loads[i])

    return choose


POLICIES: dict[str, Callable[[Fleet, Sequence[Places]], Choose]] = {
    "affinity": by_affinity,
    "presence": by_presence,
    "random": at_random,
    "round robin": in_turn,
}


def arrivals(fleet: Fleet, zipf: float) -> Iterator[tuple[float, int, float]]:
    """(time in seconds, adapter, service time in seconds) of each request, the same each time."""
    draw = random.Random(fleet.seed)
    weights = list(itertools.accumulate(1 / (i + 1) ** zipf for i in range(fleet.adapters)))
    adapters = draw.choices(range(fleet.adapters), cum_weights=weights, k=fleet.requests)
    now = 0.0
    for adapter in adapters:
        now += draw.expovariate(fleet.rate)
        yield now, adapter, draw.expovariate(1 / fleet.service_s)


def simulate(fleet: Fleet, policy: str, zipf: float) -> Row:
    """One policy on the whole trace; what is counted begins after the warm-up."""
    places = [Places(fleet.places) for _ in range(fleet.replicas)]
    choose = POLICIES[policy](fleet, places)
    loads = [0] * fleet.replicas
    ends: list[tuple[float, int]] = []
    served = [0] * fleet.replicas
    went: dict[int, dict[int, int]] = {}  # adapter -> replica -> requests
    hits = seen = queued = longest = 0
    begin = now = 0.0
    for number, (now, adapter, service_s) in enumerate(arrivals(fleet, zipf)):
        while ends and ends[0][0] <= now:
            loads[heapq.heappop(ends)[1]] -= 1
        replica = choose(adapter, loads)
        loads[replica] += 1
        heapq.heappush(ends, (now + service_s, replica))
        hit = places[replica].use(adapter)
        if number < WARM_UP * fleet.requests:
            begin = now
            continue
        seen += 1
        hits += hit
        served[replica] += 1
        to = went.setdefault(adapter, {})
        to[replica] = to.get(replica, 0) + 1
        queued += len(ends)
        longest = max(longest, loads[replica])
    return Row(
        policy,
        zipf,
        hit_rate=round(hits / seen, 4),
        stays=round(sum(max(to.values()) for to in went.values()) / seen, 4),
        busiest=round(max(served) * fleet.replicas / seen, 3),
        longest=round(longest / (queued / seen / fleet.replicas), 3),
        loads_s=round((seen - hits) / (now - begin), 1),
    )


def one_cache(fleet: Fleet, zipf: float) -> Row:
    """A single replica with the places of all, which no routing can beat by much."""
    places = Places(fleet.places * fleet.replicas)
    hits = seen = 0
    begin = now = 0.0
    for number, (now, adapter, _) in enumerate(arrivals(fleet, zipf)):
        hit = places.use(adapter)
        if number < WARM_UP * fleet.requests:
            begin = now
            continue
        seen += 1
        hits += hit
    loads_s = (seen - hits) / (now - begin)
    return Row("one cache", zipf, round(hits / seen, 4), 1.0, 1.0, 1.0, round(loads_s, 1))


def table(rows: Sequence[Row]) -> Table:
    out = Table(title="zipf traffic over a fleet")
    heads = ("zipf", "policy", "hits", "stays", "busiest", "longest queue", "loads/s")
    for head in heads:
        out.add_column(head, justify="left" if head == "policy" else "right")
    for row in rows:
        cells = (f"{row.hit_rate:.1%}", f"{row.stays:.1%}", f"{row.busiest:.2f}")
        more = (f"{row.longest:.2f}", f"{row.loads_s:.0f}")
        out.add_row(f"{row.zipf:g}", row.policy, *cells, *more)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in asdict(Fleet()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--zipf", type=float, nargs="+", default=[0.8, 1.0, 1.2])
    parser.add_argument("--output", type=Path, help="folder for a file of rows")
    given = vars(parser.parse_args(argv))
    zipfs, output = given.pop("zipf"), given.pop("output")
    fleet = Fleet(**given)
    rows = []
    for zipf in zipfs:
        rows += [simulate(fleet, policy, zipf) for policy in POLICIES] + [one_cache(fleet, zipf)]
    console = Console()
    console.print(table(rows))
    if output is not None:
        path = result_path(output, workload="fleet")
        write_results(path, header({**asdict(fleet), "zipf": zipfs, "workload": "fleet"}), [])
        for row in rows:
            append_row(path, asdict(row))
        console.print(f"rows in {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
