"""Processed images, sounds and videos that may be asked for again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loramux.models.placeholders import Expansion


@dataclass(frozen=True, slots=True)
class ProcessedItem:
    """What a model's processor made of one item: the encoder's `inputs` and what the prompt says."""

    inputs: Mapping[str, Any] = field(repr=False)
    expansion: Expansion

    @property
    def num_bytes(self) -> int:
        """Of the memory that `inputs` keep alive; a view keeps all of its tensor."""
        tensors = [value for value in self.inputs.values() if isinstance(value, Tensor)]
        kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        return sum(storage.nbytes() for storage in kept.values())


class ItemCache:
    """By digest, up to `max_bytes`; the least recently asked for goes first. Safe to call from several
    threads. An item that does not fit alone is not kept."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._items: OrderedDict[str, ProcessedItem] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, digest: str) -> ProcessedItem | None:
        with self._lock:
            item = self._items.get(digest)
            if item is not None:
                self._items.move_to_end(digest)
            return item

    def put(self, digest: str, item: ProcessedItem) -> None:
        size = item.num_bytes
        with self._lock:
            if digest in self._items or size > self.max_bytes:
                return
            self._items[digest] = item
            self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                _, oldest = self._items.popitem(last=False)
                self.num_bytes -= oldest.num_bytes
