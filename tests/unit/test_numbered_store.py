"""Processes that have met over other stores before name things alike."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist

from loramux.parallel.numbered_store import NumberedStore


def test_ranks_meet_whatever_each_has_counted() -> None:
    """Through a store of C++, as torch calls it."""
    store = dist.HashStore()
    kept = [NumberedStore(store) for _ in range(2)]
    one, other = (dist.PrefixStore("group", each) for each in kept)
    for turn in range(3):
        one.set(f"Memory/{7 + turn}/0", bytes([turn, 0, 255]))
        other.set(f"Memory/{turn}/1", b"other")
        other.wait([f"Memory/{turn}/0"], timedelta(seconds=1))
        assert other.get(f"Memory/{turn}/0") == bytes([turn, 0, 255])
        assert one.get(f"Memory/{7 + turn}/1") == b"other"


def test_what_is_not_there_is_waited_for() -> None:
    store = NumberedStore(dist.HashStore())
    store.set("Memory/3/0", b"")
    with pytest.raises(dist.DistStoreError):
        store.wait(["Memory/4/0"], timedelta(milliseconds=10))


def test_other_names_stay() -> None:
    inner = dist.HashStore()
    NumberedStore(inner).set("barrier", b"1")
    assert inner.get("barrier") == b"1"
