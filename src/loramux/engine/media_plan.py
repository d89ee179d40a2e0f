"""Which media are encoded before a step, and how far a sequence may go with that. Torch-free."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Many

from loramux.engine.encoder_cache import Encode, EncoderCache, encoder_key
from loramux.engine.media_spans import items_between, vectors_between, whole_until
from loramux.engine.plan import Row
from loramux.engine.sequence import Sequence


class MediaPlanner:
    """The part of the scheduler that sequences with media need. `encoder` is None for a text model."""

    def __init__(self, encoder: EncoderCache | None, *, see_whole: bool):
        self.encoder = encoder
        self._see_whole = see_whole

    def begin(self) -> None:
        """Start a plan."""
        if self.encoder is not None:
            self.encoder.begin()

    def count(
        self,
        sequence: Sequence,
        start: int,
        count: int,
        members: tuple[tuple[int, float], ...] | None = None,
    ) -> int:
        """How many of the `count` tokens from `start` on can be computed in this step.

        `members` are those that the sequence will have, if it has none yet."""
        encoder = self.encoder
        assert encoder is not None, "media for a model without an encoder. This is a bug."
        stop = start + count
        if self._see_whole:
            stop = whole_until(sequence.items, start, stop)
        composition = sequence.encoder_composition
        digests = [digest for digest, _ in composition]
        own = sequence.members if members is None else members
        adapting = tuple(
            member
            for digest, member in zip(sequence.digests, own, strict=True)
            if digest in digests
        )
        for item in items_between(sequence.items, start, stop):
            key = encoder_key(item, composition)
            there = encoder.has(key)
            if not encoder.want(Encode(key, item, adapting)):
                first = next(vectors_between(item, start, stop))[0]
                return first - start
            if item.spans[0][0] >= start:  # and not when it is asked again in a later step
                encoder.queries += 1
                encoder.hits += there
        return stop - start

    def lost(self) -> None:
        """A step failed, and nobody knows what it had encoded."""
        if self.encoder is not None:
            self.encoder.lose_all()

    def not_encoded(self, keys: Collection[str], rows: Many[Row]) -> dict[int, str]:
        """Vectors that did not come about: sequence -> the key that it waits for, of those in `rows`."""
        if self.encoder is None or not keys:
            return {}
        self.encoder.lose(keys)
        return {
            row.sequence_id: key
            for row in rows
            for key, *_ in (row.media.vectors if row.media else ())
            if key in keys
        }

    def finish(self, rows: Many[Row]) -> tuple[tuple[Encode, ...], tuple[str, ...]]:
        """(what to encode before a step of `rows`, what to forget before that)."""
        if self.encoder is None:
            return (), ()
        needed = {key for row in rows if row.media for key, *_ in row.media.vectors}
        return self.encoder.finish(needed)
