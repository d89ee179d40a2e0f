"""Names, versions and users."""

from __future__ import annotations

import threading

import pytest

from loramux.adapters.host_cache import HostCache
from loramux.adapters.registry import Registry
from loramux.errors import (
    AdapterConflict,
    AdapterExists,
    AdapterNotFound,
    Forbidden,
    InvalidField,
    PinRefused,
    UnknownModel,
)
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


def test_held_versions_stay_for_the_requests_that_are_made_for_them() -> None:
    gone: list[str] = []
    registry = Registry(on_gone=gone.append, max_loras=2)
    registry.publish(_ref("a", "v1"))
    registry.publish(_ref("b", "w1"))
    held = registry.hold([AdapterUse("a", 0.5), AdapterUse("b")])
    assert [use.version for use in held] == ["v1", "w1"] and held[0].scale == 0.5
    registry.publish(_ref("a", "v2"))
    registry.remove("b")
    assert gone == [] and registry.users("v1") == 1
    assert [ref.digest for ref, _ in registry.refs(held)] == ["v1", "w1"]
    assert registry.refs([AdapterUse("a")])[0][0].digest == "v2"
    acquired = registry.acquire(held)
    assert [(ref.digest, scale) for ref, scale in acquired] == [("v1", 0.5), ("w1", 1.0)]
    registry.let_go(held)
    assert gone == []
    registry.release(["v1", "w1"])
    assert gone == ["v1", "w1"]
    for call in (registry.acquire, registry.refs, registry.hold):
        with pytest.raises(UnknownModel, match="'a', 'b'"):
            call(held)
    with pytest.raises(UnknownModel, match="'c'"):
        registry.hold([AdapterUse("a"), AdapterUse("c")])
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


def test_compare_and_set() -> None:
    registry = Registry(max_loras=2)
    first, second = "1" * 64, "2" * 64
    with pytest.raises(AdapterConflict) as refused, registry.loading("a", expected=first):
        pass
    assert refused.value.current_digest is None
    with registry.loading("a", expected="none"):
        registry.publish(_ref("a", first), expected="none")
    for wrong in ("none", second, "1" * 11 + "2"):
        with pytest.raises(AdapterConflict) as refused:
            registry.check_change("a", replace=True, expected=wrong)
        assert refused.value.current_digest == first
        with pytest.raises(AdapterConflict):
            registry.publish(_ref("a", second), expected=wrong)
        with pytest.raises(AdapterConflict):
            registry.remove("a", expected=wrong)
    assert registry.current("a") == _ref("a", first)
    registry.publish(_ref("a", second), expected=first[:12])
    registry.remove("a", expected=second.upper())
    registry.check_integrity()


def test_of_many_who_expect_the_same_version_one_succeeds() -> None:
    registry = Registry()
    registry.publish(_ref("a", "start"))
    won: list[str] = []
    gate = threading.Barrier(8)

    def change(number: int) -> None:
        gate.wait()
        try:
            registry.publish(_ref("a", f"by-{number}"), expected="start")
            won.append(f"by-{number}")
        except AdapterConflict:
            pass

    threads = [threading.Thread(target=change, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    current = registry.current("a")
    assert current is not None and won == [current.digest]


def test_an_unload_during_a_replacement_is_not_undone() -> None:
    registry = Registry()
    registry.publish(_ref("a", "v1"))
    with registry.loading("a", replace=True, expected="v1"):
        registry.remove("a")
        with pytest.raises(AdapterConflict):
            registry.publish(_ref("a", "v2"), expected="v1")
    assert registry.names() == []


def test_no_more_names_than_allowed() -> None:
    registry = Registry(max_names=2)
    registry.publish(_ref("a", "v1"))
    with registry.loading("b"), pytest.raises(Forbidden, match="2 adapters"):
        registry.check_change("c")
    registry.publish(_ref("b", "v2"))
    registry.check_change("a", replace=True)
    with pytest.raises(Forbidden, match="--max-registered-adapters"), registry.loading("c"):
        pass
    registry.remove("b")
    registry.check_change("c")


def test_pins_leave_a_place_and_go_with_their_name() -> None:
    told: list[tuple[list[str], frozenset[str]]] = []
    registry = Registry(max_loras=3, on_pins=lambda refs, granted: told.append(([*refs], granted)))
    for name in "abcd":
        registry.publish(_ref(name, name * 3))
    registry.pin("a")
    registry.pin("a")
    registry.publish(_ref("b", "bbb"), pinned=True)
    assert told == [(["aaa"], {"aaa"}), (["aaa", "bbb"], {"aaa", "bbb"})]
    with pytest.raises(PinRefused, match="2 of 3"):
        registry.pin("c")
    with pytest.raises(PinRefused), registry.loading("e", pinned=True):
        pass
    with pytest.raises(PinRefused):
        registry.publish(_ref("c", "new"), pinned=True)
    assert registry.current("c") == _ref("c", "ccc"), "a refused change changes nothing"
    registry.publish(_ref("a", "new"))
    assert told[-1] == (["new", "bbb"], {"new", "bbb"}), "the new version is pinned"
    registry.remove("b")
    registry.pin("c")
    registry.pin("c", False)
    registry.unpin_failed("new")
    assert told[-1] == ([], frozenset())
    with pytest.raises(AdapterNotFound):
        registry.pin("b")
    registry.check_integrity()


def test_sums_and_pins_share_the_places() -> None:
    told: list[frozenset[str]] = []
    registry = Registry(max_loras=2, on_pins=lambda refs, granted: told.append(granted))
    for name in "abc":
        registry.publish(_ref(name, name))
    held = registry.acquire([AdapterUse("a"), AdapterUse("b")])
    registry.pin("c")
    assert told == [frozenset()], "not before the sum has ended"
    with pytest.raises(InvalidField, match="3 places"):
        registry.acquire([AdapterUse("a"), AdapterUse("b")])
    registry.release([ref.digest for ref, _ in held])
    assert told[-1] == {"c"}
    registry.release(
        [ref.digest for ref, _ in registry.acquire([AdapterUse("a"), AdapterUse("c")])]
    )
    registry.check_integrity()


def test_every_change_is_told_in_order() -> None:
    registry = Registry(max_loras=2)
    listener = registry.feed.listen(lambda: None)
    registry.publish(_ref("a", "v1"))
    registry.publish(_ref("a", "v1"))
    registry.acquire([AdapterUse("a")])
    registry.publish(_ref("a", "v2"), pinned=True)
    registry.release(["v1"])
    registry.pin("a", False)
    registry.remove("a")
    events = listener.take()
    assert [(e.kind, e.digest, e.previous) for e in events] == [
        ("registered", "v1", None),
        ("replaced", "v2", "v1"),
        ("pinned", "v2", None),
        ("draining", "v1", None),
        ("gone", "v1", None),
        ("unpinned", "v2", None),
        ("gone", "v2", None),
    ]
    assert [e.number for e in events] == list(range(1, 8))


def test_what_drains_is_listed_until_it_is_gone() -> None:
    registry = Registry()
    registry.publish(_ref("a", "v1"), 0.5)
    registry.acquire([AdapterUse("a")])
    registry.publish(_ref("a", "v2"))
    ready, draining = registry.statuses({"v1"}.__contains__, {"v2"}.__contains__)
    assert (ready.state, ready.ref.digest, ready.users, ready.place) == ("ready", "v2", 0, "device")
    assert (draining.state, draining.ref.digest, draining.users) == ("draining", "v1", 1)
    assert draining.place == "host" and draining.load_s == 0.5
    assert ready.last_used_s is None and draining.last_used_s is not None
    assert registry.is_draining("v1") and not registry.is_draining("v2")
    registry.release(["v1"])
    assert registry.version("v1") is None and len(registry.statuses(bool, bool)) == 1


def test_pinned_values_are_not_evicted() -> None:
    cache = HostCache[int](3)
    cache.pinned = {"a", "b"}
    evicted = [cache.put(key, i) for i, key in enumerate("abcde")]
    assert evicted == [[], [], [], ["c"], ["d"]]
    assert [cache.get(key) for key in "abe"] == [0, 1, 4]
    assert cache.drop("e") and not cache.drop("e")
    assert cache.values() == [0, 1]
