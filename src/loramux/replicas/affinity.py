"""Which replica an adapter's requests go to: rendezvous hashing with bounded loads. Integers only.

Each replica has a weight for each adapter, a hash of both names. The replica with the highest weight
is the adapter's *home*; when a replica comes or goes, only the adapters move that it wins or had.

    adapter a:   r2 0.91   r0 0.55   r1 0.13      home r2, then r0, then r1
    adapter b:   r0 0.78   r1 0.77   r2 0.02      home r0, ...

A replica that has far more to do than the others is passed over for the next one, so a hot adapter
spreads over as many replicas as it needs, the same ones whoever routes. A composition goes where its
heaviest weight is: to the home of one of its members.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b

# A replica may have this many times the mean of all, and any number up to SLACK. A step's cost
# hardly depends on a few requests more, and a load of an adapter costs more than to wait for them.
BALANCE = 1.5
SLACK = 16


def ranked(members: Sequence[str], replicas: tuple[str, ...], loads: Sequence[int]) -> list[int]:
    """Indices of all `replicas`, best first; `loads[i]` are the requests that replica i has now.

    `members` are the names of a request's adapters. Without any, the idlest replica is best.
    """
    if not members:
        return _idlest_first(loads)
    bound = most_load(loads)
    order = _order(tuple(members), replicas)
    below = [index for index in order if loads[index] < bound]
    return below + sorted((i for i in order if loads[i] >= bound), key=lambda i: loads[i])


def first(members: Sequence[str], replicas: tuple[str, ...], loads: Sequence[int]) -> int:
    """`ranked(...)[0]`, without ranking the rest."""
    if not members:
        return _idlest_first(loads)[0]
    bound = most_load(loads)
    order = _order(tuple(members), replicas)
    below: Iterator[int] = (index for index in order if loads[index] < bound)
    return next(below, min(order, key=lambda i: loads[i]))


def most_load(loads: Sequence[int]) -> float:
    """A replica with so many requests gets no more while another has fewer."""
    return max(SLACK, BALANCE * (sum(loads) + 1) / len(loads))


def _idlest_first(loads: Sequence[int]) -> list[int]:
    order = list(range(len(loads)))
    random.shuffle(order)  # equals in any order
    return sorted(order, key=lambda index: loads[index])


@lru_cache(maxsize=1 << 15)
def _order(members: tuple[str, ...], replicas: tuple[str, ...]) -> tuple[int, ...]:
    """Indices of the replicas by falling weight."""
    weights = [max(_weight(name, replica) for name in members) for replica in replicas]
    return tuple(sorted(range(len(replicas)), key=weights.__getitem__, reverse=True))


def _weight(name: str, replica: str) -> bytes:
    return blake2b(f"{replica}\0{name}".encode(), digest_size=8).digest()
