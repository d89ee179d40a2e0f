"""Which sequences hold adapters on the device, since when, and what must be brought there for them.

A sequence holds all its adapters or none. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loramux.adapters.pool import AdapterPool
from loramux.engine.plan import AdapterLoad
from loramux.engine.sequence import Sequence
from loramux.types import AdapterRef


@dataclass(slots=True)
class Room:
    """What is left for those that hold nothing yet, as the queue is walked from its old end."""

    held: set[str]
    limit: int
    pins: frozenset[str] = frozenset()  # some may have no place yet: what they need is left to them
    closed: bool = False  # an impatient one finds too few: what is free is left to it

    def fits(self, sequence: Sequence) -> bool:
        if self.held.issuperset(sequence.digests):
            return True
        needed = self.held.union(sequence.digests, self.pins)
        return not self.closed and len(needed) <= self.limit


class Places:
    """The adapter pool in terms of sequences; without a pool, every sequence is the base's."""

    def __init__(self, pool: AdapterPool | None):
        self._pool = pool
        self._loads: list[AdapterLoad] = []
        self._since: dict[str, float] = {}  # digest -> held without a break since
        self._pins: dict[str, AdapterRef] = {}

    def room(self) -> Room:
        if self._pool is None:
            return Room(set(), 0)
        return Room(self._pool.held(), self._pool.max_loras, self._pool.pins)

    def set_pins(self, refs: Mapping[str, AdapterRef]) -> None:
        """Pin exactly these versions, by digest."""
        assert self._pool is not None, "pins without an adapter pool. This is a bug."
        self._pins = dict(refs)
        self._pool.set_pins({digest: self._rows(ref) for digest, ref in refs.items()})

    def place_pins(self) -> None:
        """Ask for the pinned adapters that are not on the device, as far as there is room now."""
        if self._pool is not None and self._pins:
            for digest, first_row in self._pool.place_pins():
                self._loads.append(AdapterLoad(self._pins[digest], first_row))

    def take_loads(self) -> list[AdapterLoad]:
        """Adapters to bring to the device, decided since the last call."""
        loads, self._loads = self._loads, []
        return loads

    def hold(self, sequence: Sequence, now: float) -> None:
        """Hold every adapter of `sequence`, asking for those that are not on the device."""
        assert self._pool is not None, "an adapter request without an adapter pool. This is a bug."
        for digest in sequence.digests:
            ref = sequence.refs[digest]
            self._since.setdefault(digest, now)
            if (first_row := self._pool.hold(digest, self._rows(ref))) is not None:
                self._loads.append(AdapterLoad(ref, first_row))
        sequence.held = sequence.digests

    def release(self, sequence: Sequence) -> None:
        """Give back what `sequence` holds, at once.

        A step that reads these rows may still be running: the runner lets a load into them wait for
        it.
        """
        for digest in sequence.held:
            assert self._pool is not None
            self._pool.release(digest)
            if not self._pool.has_holder(digest):
                self._since.pop(digest, None)
        sequence.held, sequence.members = (), ()

    def are_resident(self, sequence: Sequence) -> bool:
        pool = self._pool
        return pool is None or all(pool.is_resident(digest) for digest in sequence.held)

    def members(self, sequence: Sequence) -> tuple[tuple[int, float], ...]:
        """(first row, scale) of each adapter; they stay there as long as it holds them."""
        if self._pool is None:
            return ()
        return tuple((self._pool.row_of(digest), scale) for digest, scale in sequence.composition)

    def _rows(self, ref: AdapterRef) -> int:
        """Pool rows to take: an adapter that changes the vocabulary has a place for itself, and one with
        gains and shifts whole places of these."""
        assert self._pool is not None
        if ref.vocabulary_size:
            return self._pool.rows_per_slot
        return self._pool.affine_r(ref.max_r) if ref.affine else ref.max_r

    def held_before(self, moment: float) -> list[str]:
        """Digests held without a break since `moment` or longer, those held longest first."""
        by_age = sorted((since, digest) for digest, since in self._since.items())
        return [digest for since, digest in by_age if since <= moment]
