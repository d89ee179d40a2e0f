"""What happens to adapters, told to whoever listens. Torch-free; safe to call from any thread.

A listener has a bounded queue. One that does not keep up is dropped: it still gets what is queued,
then learns that there was more.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from loramux.status import AdapterEvent, AdapterEventKind, AdapterPlace

QUEUE_LENGTH = 1024


class Listener:
    """One who listens; `wake` is called, in any thread, when there is something to take."""

    def __init__(self, wake: Callable[[], None], capacity: int):
        self._wake = wake
        self._capacity = capacity
        self._queue: deque[AdapterEvent] = deque()
        self.dropped = False
        """Nothing comes after what is queued: it was too slow."""

    def take(self) -> list[AdapterEvent]:
        """Events that have not been taken, oldest first."""
        taken = []
        while self._queue:
            taken.append(self._queue.popleft())
        return taken

    def put(self, event: AdapterEvent) -> bool:
        """Queue an event, or drop the listener (False) when its queue is full."""
        if len(self._queue) >= self._capacity:
            self.dropped = True
        else:
            self._queue.append(event)
        try:
            self._wake()
        except RuntimeError:  # its event loop is closed
            self.dropped = True
        return not self.dropped


class EventFeed:
    """Numbers events and hands them to every listener; without one it only counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[Listener] = []
        self._count = 0

    def listen(self, wake: Callable[[], None], capacity: int = QUEUE_LENGTH) -> Listener:
        """A listener that hears all from now on, until `leave`."""
        listener = Listener(wake, capacity)
        with self._lock:
            self._listeners.append(listener)
        return listener

    def leave(self, listener: Listener) -> None:
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    @property
    def num_listeners(self) -> int:
        return len(self._listeners)

    def tell(
        self,
        kind: AdapterEventKind,
        name: str,
        digest: str,
        *,
        place: AdapterPlace | None = None,
        previous: str | None = None,
    ) -> None:
        with self._lock:
            self._count += 1
            if not self._listeners:
                return
            event = AdapterEvent(self._count, kind, name, digest, time.time(), place, previous)
            self._listeners = [one for one in self._listeners if one.put(event)]
