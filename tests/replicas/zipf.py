"""Zipf traffic over adapters, and what a cache of least recently used ones makes of it."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def trace(num_adapters: int, num_requests: int, seed: int = 0) -> list[int]:
    """Adapter of each request; adapter i is asked for in proportion to 1 / (i + 1)."""
    weights = [1 / (i + 1) for i in range(num_adapters)]
    return random.Random(seed).choices(range(num_adapters), weights, k=num_requests)


def lru_hit_rate(traces: Iterable[Sequence[int]], num_places: int) -> float:
    """Share of hits over several caches, each with a trace of its own."""
    hits = total = 0
    for asked in traces:
        cache: OrderedDict[int, None] = OrderedDict()
        for adapter in asked:
            hits += adapter in cache
            cache[adapter] = None
            cache.move_to_end(adapter)
            if len(cache) > num_places:
                cache.popitem(last=False)
        total += len(asked)
    return hits / total
