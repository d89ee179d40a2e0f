"""Which rank rows the steps that may still run read, so that a load waits for those steps alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

from loramux.engine.plan import Row

Event = TypeVar("Event")

IN_FLIGHT = 2  # steps: one that runs, and one that was launched behind it


class Reading(Generic[Event]):
    """The steps launched last, each with the event that fires when it is done.

    Written by the step loop's thread, read by the thread that loads: an adapter's rows were given
    up by the scheduler before, so no later step reads what stood there.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[Event, dict[int, int]]] = deque(maxlen=IN_FLIGHT)

    def launched(self, event: Event, places: Mapping[int, int]) -> None:
        """A step reads the rank rows of `places`: first row -> number of rows."""
        self._steps.append((event, dict(places)))

    def until(self, first_row: int, rows: int) -> Event | None:
        """The event of the newest step that reads one of these rows; None: they may be written."""
        end = first_row + rows
        for event, places in reversed(tuple(self._steps)):
            if any(first < end and first_row < first + count for first, count in places.items()):
                return event
        return None


def places_of(rows: Sequence[Row], ranks: Mapping[int, int]) -> dict[int, int]:
    """First row -> rank rows of every adapter in a step; `ranks` knows those of all places."""
    return {first: ranks[first] for row in rows for first, _ in row.members}
