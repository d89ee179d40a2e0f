"""Names, versions and users."""

from __future__ import annotations

import threading

import pytest

from loramux.adapters.host_cache import HostCache
from loramux.adapters.registry import Registry
from loramux.errors import AdapterExists, AdapterNotFound, UnknownModel
from loramux.types import AdapterRef, AdapterUse


def _ref(name: str, digest: str) -> AdapterRef:
    return AdapterRef(name, digest, f"/{name}", 4, 10)


def test_replacement_drains_the_old_version() -> None:
    gone: list[str] = []
    registry = Registry(on_gone=gone.append)
    registry.publish(_ref("a", "v1"))
    held = registry.acquire([AdapterUse("a", 0.5)])
    registry.publish(_ref("a", "v2"))
    assert held == ((_ref("a", "v1"), 0.5),)
    assert registry.acquire([AdapterUse("a")])[0][0].digest == "v2"
    assert gone == []
    registry.release(["v1"])
    assert gone == ["v1"]
    registry.release(["v2"])
    registry.check_integrity()


def test_remove_while_in_use_finishes_first() -> None:
    gone: list[str] = []
    registry = Registry(on_gone=gone.append)
    registry.publish(_ref("a", "v1"))
    registry.acquire([AdapterUse("a")])
    registry.remove("a")
    with pytest.raises(UnknownModel, match="'a'"):
        registry.acquire([AdapterUse("a")])
    with pytest.raises(AdapterNotFound):
        registry.remove("a")
    assert gone == [] and registry.users("v1") == 1
    registry.release(["v1"])
    assert gone == ["v1"]
    registry.check_integrity()


def test_two_names_of_one_content_share_it() -> None:
    gone: list[str] = []
    registry = Registry(on_gone=gone.append)
    registry.publish(_ref("a", "v1"))
    registry.publish(_ref("b", "v1"))
    registry.remove("a")
    current = registry.current("b")
    assert gone == [] and current is not None and current.name == "b"
    registry.remove("b")
    assert gone == ["v1"]


def test_unknown_names_take_nothing() -> None:
    registry = Registry()
    registry.publish(_ref("a", "v1"))
    with pytest.raises(UnknownModel, match="'b', 'c'"):
        registry.acquire([AdapterUse("a"), AdapterUse("b"), AdapterUse("c")])
    registry.check_integrity()


def test_one_load_of_a_name_at_a_time() -> None:
    registry = Registry(["base"])
    with registry.loading("a"):
        with pytest.raises(AdapterExists, match="another call"), registry.loading("a"):
            pass
        with registry.loading("b"):
            pass
    with registry.loading("a"):
        registry.publish(_ref("a", "v1"))
    with pytest.raises(AdapterExists, match="load_inplace"), registry.loading("a"):
        pass
    with registry.loading("a", replace=True):
        pass
    with pytest.raises(AdapterExists, match="base model"), registry.loading("base", replace=True):
        pass


def test_many_threads_leave_no_user_behind() -> None:
    registry = Registry()
    registry.publish(_ref("a", "v0"))

    def work(seed: int) -> None:
        for i in range(200):
            held = registry.acquire([AdapterUse("a"), AdapterUse("a", 0.5)])
            registry.publish(_ref("a", f"v{(seed + i) % 5}"))
            registry.release([ref.digest for ref, _ in held])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    registry.check_integrity()


def test_host_cache_is_lru_and_never_over_capacity() -> None:
    cache = HostCache[int](2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert cache.get("b") is None and len(cache) == 2 and cache.evictions == 1
    cache.put("c", 4)
    assert (cache.get("c"), cache.get("a"), cache.evictions) == (4, 1, 1)
    cache.drop("c")
    assert "c" not in cache
