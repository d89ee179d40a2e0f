"""Adapters ready in host memory: at most `capacity` of them, least recently used out first, those
that are pinned never.

Does not know what an adapter is; safe to call from any thread.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Collection
from typing import Generic, TypeVar

Value = TypeVar("Value")


class HostCache(Generic[Value]):
    """digest -> value with LRU eviction. A value in use elsewhere lives on there; here it is gone."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.evictions = 0
        self.pinned: Collection[str] = frozenset()
        """Fewer than `capacity` of them; replaced whole, never changed."""
        self._lock = threading.Lock()
        self._values: OrderedDict[str, Value] = OrderedDict()

    def get(self, digest: str) -> Value | None:
        """The value, which becomes the most recently used, or None."""
        with self._lock:
            if digest in self._values:
                self._values.move_to_end(digest)
            return self._values.get(digest)

    def put(self, digest: str, value: Value) -> list[str]:
        """Keep `value`; room is made before it is taken, so the capacity holds at every moment.

        Returns what was evicted for it."""
        evicted: list[str] = []
        with self._lock:
            if digest not in self._values and len(self._values) >= self.capacity:
                pinned = self.pinned
                evicted = [next(key for key in self._values if key not in pinned)]
                del self._values[evicted[0]]
                self.evictions += 1
            self._values[digest] = value
            self._values.move_to_end(digest)
        return evicted

    def drop(self, digest: str) -> bool:
        """Whether it was there."""
        with self._lock:
            return self._values.pop(digest, None) is not None

    def values(self) -> list[Value]:
        with self._lock:
            return list(self._values.values())

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return digest in self._values

    def __len__(self) -> int:
        with self._lock:
            return len(self._values)


class HostMemory:
    """Memory to read files into. What the last user lets go of serves the next one.

    Memory that is new to the process costs a page fault every 4 KiB, which takes longer than the
    reading itself. One piece is kept: with a full cache the next read gets what was evicted last.
    """

    def __init__(self) -> None:
        self._spare: deque[mmap.mmap] = deque(maxlen=1)  # its methods are atomic

    def take(self, size: int) -> memoryview:
        """`size` writable bytes, aligned to a page. They come back when nothing refers to them."""
        block = self._reuse(size) or mmap.mmap(-1, max(size, 1))
        owner = (ctypes.c_ubyte * size).from_buffer(block)
        # At the end of the process there is nobody to give it to.
        weakref.finalize(owner, self._spare.append, block).atexit = False
        return memoryview(owner).cast("B")

    def _reuse(self, size: int) -> mmap.mmap | None:
        """The spare piece if it is large enough and not twice too large."""
        try:
            block = self._spare.pop()
        except IndexError:
            return None
        return block if size <= len(block) <= 2 * size else None
