"""Adapters on their way: from disk ahead of time, and from host memory to their rows on the device.

All of it happens in the store's reader thread; the step loop only asks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from loramux.adapters.store import AdapterStore
from loramux.adapters.weights import AdapterWeights
from loramux.engine.plan import AdapterLoad
from loramux.errors import AdapterLoadFailed, LoramuxError
from loramux.models.device_memory import is_out_of_memory
from loramux.types import AdapterRef

logger = logging.getLogger(__name__)

# There is one reader, first come first served: a long row of adapters that may be wanted would keep
# the next one that is wanted now waiting, and in a small host cache they would push each other out.
MAX_PREFETCHES = 4

MORE_FREE_MEMORY = (
    "start with a lower --gpu-memory-utilization or --kv-cache-memory to leave more of it free"
)

Write = Callable[[AdapterLoad, AdapterWeights], None]
Arrived = Callable[[AdapterRef, LoramuxError | None], None]


class AdapterLoads:
    """Starts loads; `write` puts weights into their rows, `arrived` hears how each load ended.

    Both are called in the reader's thread.
    """

    def __init__(self, store: AdapterStore, write: Write, arrived: Arrived):
        self._store = store
        self._write = write
        self._arrived = arrived
        self._prefetching: set[str] = set()

    def start(self, load: AdapterLoad) -> None:
        """Bring an adapter to the device."""
        self._store.bring(load.ref, partial(self._place, load))

    def prefetch(self, ref: AdapterRef) -> None:
        """Have an adapter in host memory soon, if it is not there. A failure shows when it is used."""
        digest = ref.digest
        if digest in self._store.host or digest in self._prefetching:
            return
        if len(self._prefetching) < MAX_PREFETCHES:
            self._prefetching.add(digest)
            self._store.fetch(ref).add_done_callback(lambda _: self._prefetching.discard(digest))

    def _place(self, load: AdapterLoad, weights: Callable[[], AdapterWeights]) -> None:
        failure: LoramuxError | None = None
        try:
            self._write(load, weights())
        except LoramuxError as error:
            failure = error
        except Exception as error:  # memory, or a bug: this request ends, the server does not
            logger.exception("loading adapter %r failed", load.ref.name)
            failure = _failure(load.ref.name, error)
        self._arrived(load.ref, failure)


def _failure(name: str, error: Exception) -> AdapterLoadFailed:
    """What the requests that waited for adapter `name` are told."""
    if is_out_of_memory(error):
        return AdapterLoadFailed(
            f"there is not enough memory to load adapter {name!r}", remedy=MORE_FREE_MEMORY
        )
    return AdapterLoadFailed(f"adapter {name!r} could not be loaded: {error}")
