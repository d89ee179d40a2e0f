"""A store whose keys are numbered from zero, whatever else the process has met over.

torch's symmetric memory names what ranks tell each other `<prefix>/<number>/<rank>`, and counts over all
groups of a process (https://github.com/pytorch/pytorch/issues/196082). Rank 0 stays the same process
from one engine to the next and the others are new, so from its second engine on they would wait for
names that nobody uses.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store

_NUMBERED = re.compile(r"(.*/)(\d+)(/\d+)")


class NumberedStore(Store):
    """`store`, with the first number of each prefix taken for zero. Called from C++, which does not keep
    it: whoever hands it over does."""

    def __init__(self, store: Any):
        super().__init__()
        self._store = store
        self._first: dict[str, int] = {}

    def set(self, key: str, value: Any) -> None:
        self._store.set(self._named(key), value)

    def get(self, key: str) -> bytes:
        found: bytes = self._store.get(self._named(key))
        return found

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        self._store.wait([self._named(key) for key in keys], *timeout)

    def _named(self, key: str) -> str:
        match = _NUMBERED.fullmatch(key)
        if match is None:
            return key
        prefix, number, rank = match.groups()
        return f"{prefix}{int(number) - self._first.setdefault(prefix, int(number))}{rank}"
