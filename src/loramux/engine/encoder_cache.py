"""Which media's vectors are on the device, in integers: who has them, and who goes when room is short.

The vectors of an item are kept under what they were made of: the item, and the adapters that touch the
encoder. A plan asks for what its rows need; what is not there is encoded before the step. Torch-free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from loramux.types import Composition, MediaItem


def encoder_key(item: MediaItem, composition: Composition) -> str:
    """Names an item's vectors under the adapters of `composition` that touch the encoder."""
    return f"{item.digest}{composition!r}" if composition else item.digest


@dataclass(frozen=True, slots=True)
class Encode:
    """Make the vectors of an item. `members` as in a row: the adapters that touch the encoder."""

    key: str
    item: MediaItem
    members: tuple[tuple[int, float], ...]


class EncoderCache:
    """Room for `capacity` vectors, of which a step makes `most_in_step` (or those of one item)."""

    def __init__(self, capacity: int, most_in_step: int):
        self.capacity = capacity
        self.most_in_step = most_in_step
        self.queries = 0  # items that steps came to, counted by the scheduler
        self.hits = 0  # of these, there already
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the least recently used first
        self._used = 0
        self._in_use: set[str] = set()  # by the plan that is being made
        self._new: dict[str, Encode] = {}
        self._gone: list[str] = []

    def begin(self) -> None:
        """Start a plan."""
        self._in_use.clear()

    def has(self, key: str) -> bool:
        """Whether it was there before this plan."""
        return key in self._sizes and key not in self._new

    def want(self, encode: Encode) -> bool:
        """Have the vectors for this plan. False: not in this step."""
        key, size = encode.key, encode.item.num_vectors
        if key not in self._sizes:
            made = sum(self._sizes[other] for other in self._new)
            if self._new and made + size > self.most_in_step:
                return False
            if not self._make_room(size):
                return False
            self._sizes[key] = size
            self._used += size
            self._new[key] = encode
        self._sizes.move_to_end(key)
        self._in_use.add(key)
        return True

    def finish(self, needed: Collection[str]) -> tuple[tuple[Encode, ...], tuple[str, ...]]:
        """End a plan whose rows need these: (what to encode, what to forget before)."""
        for key in [key for key in self._new if key not in needed]:
            self._drop(key)  # asked for by a row that did not come to run
            self._gone.remove(key)
        new, gone = tuple(self._new.values()), tuple(self._gone)
        self._new, self._gone = {}, []
        return new, gone

    def lose(self, keys: Collection[str]) -> None:
        """These did not come about, or may not be there any more."""
        for key in keys:
            if key in self._sizes:
                self._drop(key)

    def lose_all(self) -> None:
        self.lose(list(self._sizes))

    def _make_room(self, size: int) -> bool:
        idle = [key for key in self._sizes if key not in self._in_use]
        if self._used - sum(self._sizes[key] for key in idle) + size > self.capacity:
            return False
        for key in idle:
            if self._used + size <= self.capacity:
                break
            self._drop(key)
        return True

    def _drop(self, key: str) -> None:
        self._used -= self._sizes.pop(key)
        self._new.pop(key, None)
        self._in_use.discard(key)
        self._gone.append(key)
