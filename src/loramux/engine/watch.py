"""Telling a rank that will not come back from one that is busy.

Each rank gives signs of life from a thread of its own; a stopped process gives none. With them comes
how many collectives it has entered: while rank 0 waits for a step, that number grows on some rank. A
step that takes long is no fault, one that stands still is.

Time is what `tick` is told, in seconds, so a machine that slept has not been silent.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

STARTING_S = 600.0  # at least, until all are ready: loading and compiling may stop all threads


class Watch:
    """Of ranks 1 to `size` - 1, by rank 0. Safe from any thread."""

    def __init__(self, size: int, limit_s: float):
        self._limit_s = limit_s
        self._starting = True
        self._lock = threading.Lock()
        self._silent_s = dict.fromkeys(range(1, size), 0.0)
        self._entered = dict.fromkeys(range(size), 0)
        self._writing_s = dict.fromkeys(range(1, size), 0.0)
        self._waiting = 0
        self._still_s = 0.0

    def heard(self, rank: int, entered: int, writing_s: float) -> None:
        """A sign of life from `rank`, which has entered so many collectives and has been writing an
        adapter for so long."""
        with self._lock:
            self._silent_s[rank] = 0.0
            self._writing_s[rank] = writing_s
            self._moved(rank, entered)

    def ready(self) -> None:
        """All have started: from now on the limit counts."""
        with self._lock:
            self._starting = False
            self._silent_s = dict.fromkeys(self._silent_s, 0.0)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While rank 0 waits for a step of all ranks."""
        with self._lock:
            self._waiting += 1
            self._still_s = 0.0
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1

    def tick(self, passed_s: float, entered: int) -> tuple[int, str] | None:
        """After `passed_s`, and `entered` collectives on rank 0: a rank to give up, and why."""
        with self._lock:
            self._moved(0, entered)
            limit_s = max(self._limit_s, STARTING_S) if self._starting else self._limit_s
            for rank in self._silent_s:
                self._silent_s[rank] += passed_s
                if self._silent_s[rank] > limit_s:
                    return rank, f"no sign of life for {limit_s:g} s"
                if self._writing_s[rank] > limit_s:
                    return rank, f"writing an adapter has taken more than {limit_s:g} s"
            self._still_s = self._still_s + passed_s if self._waiting else 0.0
            if self._still_s <= limit_s:
                return None
            last = min(self._entered, key=lambda rank: (self._entered[rank], -rank))
            return last, f"a step has stood still for {limit_s:g} s"

    def _moved(self, rank: int, entered: int) -> None:
        if entered != self._entered[rank]:
            self._entered[rank] = entered
            self._still_s = 0.0
