"""Which versions keep their places, decided so that every request can still run. Torch-free.

Requests and pins share `max_loras` places. A request with the adapters D can run, whatever else
happens, as long as

    |D and all that is pinned|  <=  max_loras

Names may be pinned up to max_loras - 1, so a request with one adapter always fits. One with several
is refused when it comes if it does not fit beside the pins. A pin that comes later than such a
request is *granted*, which makes it count on the device, when that request has ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from loramux.errors import InvalidField, PinRefused


class Pins:
    """Pinned names, and the requests that they must leave room for. The registry's lock guards it."""

    def __init__(self, max_loras: int):
        self._max_loras = max_loras
        self.names: set[str] = set()
        self.granted: frozenset[str] = frozenset()  # digests
        self._sums: Counter[frozenset[str]] = Counter()  # of two adapters or more, in flight

    def check(self, name: str) -> None:
        """Raise PinRefused if `name` cannot be pinned beside the others."""
        if name in self.names or len(self.names) + 1 < self._max_loras:
            return
        taken = f"{len(self.names)} of {self._max_loras} places are pinned"
        raise PinRefused(
            f"{name!r} cannot be pinned: {taken}, and one must stay free for all other adapters",
            field="lora_name",
            remedy="unpin another adapter, or start with a larger --max-loras",
        )

    def admit(self, digests: Collection[str], pinned: Collection[str]) -> None:
        """Raise InvalidField for a new request that does not fit beside what is `pinned`."""
        needed = len({*digests, *pinned})
        if pinned and len(digests) > 1 and needed > self._max_loras:
            raise InvalidField(
                f"{len(digests)} adapters in one request and the pinned ones need {needed} places, "
                f"and max_loras is {self._max_loras}",
                field="lora",
                remedy="name fewer, or have an adapter unpinned",
            )

    def enter(self, digests: frozenset[str]) -> None:
        """A request with these adapters is in flight."""
        if len(digests) > 1:
            self._sums[digests] += 1

    def leave(self, digests: frozenset[str]) -> bool:
        """It has ended. Whether something may be granted now that was not before."""
        if len(digests) < 2:
            return False
        self._sums[digests] -= 1
        if self._sums[digests]:
            return False
        del self._sums[digests]
        return True

    def grant(self, pinned: Sequence[str]) -> None:
        """Choose what of `pinned` is granted; what was stays so."""
        granted = set(self.granted.intersection(pinned))
        for digest in pinned:
            more = granted | {digest}
            if len(more) < self._max_loras and all(
                len(more | members) <= self._max_loras for members in self._sums
            ):
                granted = more
        self.granted = frozenset(granted)

    @property
    def is_empty(self) -> bool:
        """No request is in flight that was counted."""
        return not self._sums
