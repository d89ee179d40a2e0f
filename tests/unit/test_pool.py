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

    @invariant()
    def held_adapters_stay(self) -> None:
        held = self.pool.held()
        assert set(self.holds) <= held
        assert len(held) <= 3
        assert self.pool.can_hold(["z"]) == (len(held) < 3)

    def teardown(self) -> None:
        for name in list(self.loading):
            self.pool.loaded(name)
        for name in self.holds:
            self.pool.release(name)
        self.pool.check_integrity()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
