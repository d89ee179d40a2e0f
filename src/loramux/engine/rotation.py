"""Places for adapters that have waited too long: others give theirs up. Torch-free.

After `patience_s` the adapters that were held longest give way to a waiting sequence, and their
sequences go back to the queue: those that came later, and those that had their turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from loramux.adapters.pool import AdapterPool
from loramux.engine.places import Places
from loramux.engine.sequence import Sequence

FEW = 8  # running sequences: with so many, turns are as long as the patience


class Rotation:
    """Which sequences lose their places to which."""

    def __init__(
        self,
        pool: AdapterPool | None,
        places: Places,
        preempt: Callable[[Sequence, float], None],
        patience_s: float,
    ):
        """`preempt(sequence, queued_at)` puts a running sequence back into the queue."""
        self._pool = pool
        self._places = places
        self._preempt = preempt
        self._patience_s = patience_s

    def is_impatient(self, sequence: Sequence, now: float) -> bool:
        return now - sequence.queued_at >= self._patience_s

    def run(self, waiting: list[Sequence], running: Collection[Sequence], now: float) -> bool:
        """Give places to the oldest of `waiting` that has waited too long for its adapters, if any.
        Whether none is left that finds too few.

        Before anything is scheduled, since those that give way must not be in the step.
        """
        if self._pool is None:
            return True
        room = self._places.room()
        for index, sequence in enumerate(waiting):
            if not self.is_impatient(sequence, now):
                return True  # and all behind it are younger
            if sequence.held or room.fits(sequence):
                continue
            older, younger = waiting[:index], waiting[index + 1 :]
            self._rotate(sequence, older, younger, running, now)
            if not self._pool.can_hold(sequence.digests):
                return False
            self._places.hold(sequence, now)
            return True
        return True

    def _rotate(
        self,
        sequence: Sequence,
        older: list[Sequence],
        younger: list[Sequence],
        running: Collection[Sequence],
        now: float,
    ) -> None:
        """Take places until `sequence` fits: from younger ones that wait, then from those held longest.

        None of the latter goes before it had `patience_s` itself, nor before each of its sequences
        has got a token further, nor while only older ones wait for it: else two of them could push
        each other out for ever.
        """
        pool = self._pool
        assert pool is not None
        for other in reversed(younger):
            if other.held:
                self._places.release(other)
                if pool.can_hold(sequence.digests):
                    return
        stuck = {d for s in older for d in s.held} - {d for s in running for d in s.held}
        stuck |= {d for s in running if not s.has_advanced for d in s.held}
        stuck.update(sequence.digests, pool.pins)
        for digest in self._places.held_before(now - self._patience_s):
            if pool.can_hold(sequence.digests):
                return
            holders = [s for s in running if digest in s.held]
            if digest in stuck or not all(
                self._gives_way(s, sequence, len(running), now) for s in holders
            ):
                continue
            for other in holders:
                self._preempt(other, now)
            for other in older:
                if digest in other.held:
                    self._places.release(other)

    def _gives_way(self, other: Sequence, waiting: Sequence, num_running: int, now: float) -> bool:
        """Whether one that runs may be put back for one that waits: it came later, or had its turn.

        What is put back is computed again. So that this takes a small part of the time only, turns
        are the longer, the more sequences would be put back in each."""
        if other.queued_at > waiting.queued_at:
            return True
        turn = max(1.0, num_running / FEW) * self._patience_s
        return now - other.admitted_at >= turn
