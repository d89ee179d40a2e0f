"""Adapters ready in host memory: at most `capacity` of them, least recently used out first.

Does not know what an adapter is; safe to call from any thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")


class HostCache(Generic[Value]):
    """digest -> value with LRU eviction. A value in use elsewhere lives on there; here it is gone."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.evictions = 0
        self._lock = threading.Lock()
        self._values: OrderedDict[str, Value] = OrderedDict()

    def get(self, digest: str) -> Value | None:
        """The value, which becomes the most recently used, or None."""
        with self._lock:
            if digest in self._values:
                self._values.move_to_end(digest)
            return self._values.get(digest)

    def put(self, digest: str, value: Value) -> None:
        """Keep `value`; room is made before it is taken, so the capacity holds at every moment."""
        with self._lock:
            if digest not in self._values and len(self._values) >= self.capacity:
                self._values.popitem(last=False)
                self.evictions += 1
            self._values[digest] = value
            self._values.move_to_end(digest)

    def drop(self, digest: str) -> None:
        with self._lock:
            self._values.pop(digest, None)

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return digest in self._values

    def __len__(self) -> int:
        with self._lock:
            return len(self._values)
