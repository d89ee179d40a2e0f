"""Vectors of media on the device, in integers: against a device that only counts."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from loramux.engine.encoder_cache import Encode, EncoderCache, encoder_key
from loramux.types import MediaItem


def encode(name: str, size: int) -> Encode:
    return Encode(name, MediaItem("image", name, ((0, size),), {}), ())


@given(st.integers(0, 2**32), st.integers(8, 40), st.integers(1, 40))
def test_the_device_has_what_a_plan_needs_and_no_more_than_fits(
    seed: int, capacity: int, most: int
) -> None:
    dice = random.Random(seed)
    cache, device = EncoderCache(capacity, most), {}
    sizes = {f"m{i}": dice.randint(1, 8) for i in range(12)}
    for _ in range(30):
        cache.begin()
        wanted = dice.sample(sorted(sizes), dice.randint(0, 4))
        got = [name for name in wanted if cache.want(encode(name, sizes[name]))]
        needed = {name for name in got if dice.random() < 0.8}  # some rows do not come to run
        new, gone = cache.finish(needed)
        for key in gone:
            device.pop(key, None)
        for one in new:
            assert one.key not in device, "encoded twice"
            device[one.key] = one.item.num_vectors
        assert needed <= set(device)
        assert sum(device.values()) <= capacity
        made = [one.item.num_vectors for one in new]
        assert len(made) <= 1 or sum(made) <= most
        if dice.random() < 0.1:
            cache.lose_all()
    cache.begin()
    assert cache.want(encode("large", capacity)), "with nothing in use everything may go"


def test_what_fits_is_kept_and_the_least_recently_used_goes_first() -> None:
    cache = EncoderCache(10, 10)

    def step(*names: str) -> tuple[list[str], tuple[str, ...]]:
        cache.begin()
        assert all(cache.want(encode(name, 4)) for name in names)
        new, gone = cache.finish(set(names))
        return [one.key for one in new], gone

    assert step("a") == (["a"], ())
    assert step("b") == (["b"], ())
    assert step("a") == ([], ())
    assert step("c") == (["c"], ("b",))
    assert cache.has("a") and not cache.has("b")
    cache.lose(["a"])
    assert step("a") == (["a"], ("a",))  # what may still lie there goes first
    cache.begin()
    assert not cache.want(encode("huge", 11))


def test_a_step_makes_only_so_many_vectors_but_one_item_always() -> None:
    cache = EncoderCache(100, 10)
    cache.begin()
    assert cache.want(encode("large", 30))
    assert not cache.want(encode("small", 1))
    assert [one.key for one in cache.finish({"large"})[0]] == ["large"]
    cache.begin()
    assert cache.want(encode("small", 1)) and cache.want(encode("large", 30))
    assert [one.key for one in cache.finish({"large", "small"})[0]] == ["small"]


def test_keys_name_the_adapters_that_touch_the_encoder() -> None:
    item = MediaItem("image", "d", ((0, 1),), {})
    compositions = [(), (("a", 1.0),), (("a", 0.5),), (("b", 1.0),)]
    assert len({encoder_key(item, c) for c in compositions}) == 4
