"""Python's cyclic garbage collector, kept from looking through what a started engine is made of.

A model, its libraries and their modules are about a million objects that live as long as the process.
A full collection visits all of them, 0.2 s in which no stream gets a token.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

_lock = threading.Lock()
_settled: set[object] = set()


def settle() -> Callable[[], None]:
    """What is there now is not looked at again, until every function that this gave was called."""
    one = object()
    gc.collect()
    with _lock:
        _settled.add(one)
        gc.freeze()

    def unsettle() -> None:
        with _lock:
            _settled.discard(one)
            if not _settled:
                gc.unfreeze()

    return unsettle
