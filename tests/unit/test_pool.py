"""Places of adapters: exact rows, no overlap, and always room for one more below max_loras."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loramux.adapters.pool import AdapterPool


def _load(pool: AdapterPool, digest: str, r: int) -> int:
    row = pool.hold(digest, r)
    assert row is not None
    pool.loaded(digest)
    return row


def test_small_adapters_share_a_slot() -> None:
    pool = AdapterPool(max_loras=2, max_lora_rank=16)
    rows = [_load(pool, name, 8) for name in "ab"]
    assert rows == [0, 8]
    for name in "ab":
        pool.release(name)
    assert _load(pool, "c", 16) == 16
    assert len(pool.resident()) == 3


def test_idle_adapters_go_least_recently_used_first() -> None:
    pool = AdapterPool(max_loras=2, max_lora_rank=4)
    for name in "ab":
        _load(pool, name, 4)
        pool.release(name)
    assert pool.hold("a", 4) is None  # still there
    pool.release("a")
    _load(pool, "c", 4)
    assert pool.resident() == ["a", "c"]
    assert pool.evictions == 1


def test_a_gone_version_frees_its_rows_even_while_it_is_being_loaded() -> None:
    pool = AdapterPool(1, 4)
    pool.hold("a", 4)
    pool.release("a")
    pool.drop("a")
    assert not pool.can_hold(["b"])  # its rows are being written
    pool.loaded("a")
    assert pool.can_hold(["b"])
    assert pool.resident() == []


def test_a_pinned_adapter_is_brought_and_stays() -> None:
    pool = AdapterPool(max_loras=2, max_lora_rank=4)
    _load(pool, "a", 4)
    pool.release("a")
    pool.set_pins({"p": 4})
    assert pool.place_pins() == [("p", 4)] and pool.place_pins() == []
    pool.loaded("p")
    for name in "bcd":
        _load(pool, name, 4)
        pool.release(name)
        assert pool.resident() == ["p", name]
    assert not pool.can_hold(["a", "b"]) and pool.can_hold(["p", "b"])
    pool.set_pins({})
    assert pool.can_hold(["a", "b"])
    pool.drop("p")
    assert "p" not in pool and pool.rows_taken == 4


def test_a_pin_waits_for_room_and_keeps_it_from_others() -> None:
    pool = AdapterPool(max_loras=2, max_lora_rank=4)
    for name in "ab":
        _load(pool, name, 4)
    pool.set_pins({"p": 4})
    assert pool.place_pins() == []
    assert pool.can_hold(["a", "b"]), "what is there may be held on"
    pool.release("a")
    assert not pool.can_hold(["c"]), "this place is the pin's"
    assert pool.place_pins() == [("p", 0)]
    pool.load_failed("p")
    assert pool.can_hold(["c"]) and not pool.pins, "one that cannot be read is pinned no longer"


def test_what_is_evicted_is_told() -> None:
    pool = AdapterPool(max_loras=1, max_lora_rank=4)
    told: list[str] = []
    pool.on_evict = told.append
    for name in "ab":
        _load(pool, name, 3)
        pool.release(name)
    assert told == ["a"]


class PoolMachine(RuleBasedStateMachine):
    """Holds, loads and releases in any order; `can_hold` must never promise too much."""

    RANKS = dict(zip("abcdefgh", [1, 2, 3, 4, 5, 6, 7, 8], strict=True))

    def __init__(self) -> None:
        super().__init__()
        self.pool = AdapterPool(max_loras=3, max_lora_rank=8)
        self.holds: list[str] = []
        self.loading: dict[str, int] = {}

    @rule(name=st.sampled_from("abcdefgh"))
    def hold(self, name: str) -> None:
        if not self.pool.can_hold([name]):
            return
        row = self.pool.hold(name, self.RANKS[name])
        if row is not None:
            assert name not in self.loading
            self.loading[name] = row
        self.holds.append(name)

    @rule(data=st.data())
    def loaded(self, data: st.DataObject) -> None:
        if self.loading:
            name = data.draw(st.sampled_from(sorted(self.loading)))
            row = self.loading.pop(name)
            self.pool.loaded(name)
            assert not self.pool.is_resident(name) or self.pool.row_of(name) == row

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.holds:
            self.pool.release(self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1))))

    @rule(name=st.sampled_from("abcdefgh"))
    def drop(self, name: str) -> None:
        self.pool.drop(name)

    @rule(names=st.sets(st.sampled_from("abcdefgh"), max_size=2))
    def pin(self, names: set[str]) -> None:
        self.pool.set_pins({name: self.RANKS[name] for name in sorted(names)})

    @rule()
    def place_pins(self) -> None:
        for name, row in self.pool.place_pins():
            assert name not in self.loading
            self.loading[name] = row

    @invariant()
    def held_adapters_stay(self) -> None:
        held, pins = self.pool.held(), self.pool.pins
        assert set(self.holds) <= held
        assert len(held) <= 3
        assert self.pool.can_hold(["z"]) == (len(held | pins) < 3)
        assert len(held) == 3 or not pins - held or len(held | pins) > 3 or self.pool.can_hold(pins)

    def teardown(self) -> None:
        for name in list(self.loading):
            self.pool.loaded(name)
        for name in self.holds:
            self.pool.release(name)
        self.pool.place_pins()
        assert self.pool.pins <= self.pool.held(), "with nothing held, every pin has its place"
        self.pool.check_integrity()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
