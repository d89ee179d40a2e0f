"""The block pool under random use: nothing lost, nothing shared by mistake."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loramux.engine.blocks import BlockPool, chain_key, chain_root
from loramux.types import Composition


def _chain(tokens: list[int], composition: Composition = ()) -> list[bytes]:
    keys, previous = [], chain_root(composition)
    for i in range(0, len(tokens) - 1, 2):
        previous = chain_key(previous, tokens[i : i + 2])
        keys.append(previous)
    return keys


@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=12), st.lists(st.integers(0, 3), max_size=12)
)
def test_chain_keys_are_equal_exactly_for_equal_prefixes(left: list[int], right: list[int]) -> None:
    for i, (a, b) in enumerate(zip(_chain(left), _chain(right), strict=False)):
        assert (a == b) == (left[: 2 * i + 2] == right[: 2 * i + 2])


def test_keys_differ_by_adapter_version_and_scale() -> None:
    roots = {chain_root(c) for c in [(), (("a", 1.0),), (("a", 0.5),), (("b", 1.0),)]}
    assert len(roots) == 4


def test_freed_blocks_are_found_again_until_they_are_needed() -> None:
    pool = BlockPool(3, 2)
    blocks = pool.take(2) or []
    keys = _chain([1, 2, 3, 4])
    for block, key in zip(blocks, keys, strict=True):
        pool.remember(block, key)
    pool.release(blocks)
    assert pool.match(keys) == blocks
    pool.share(blocks)
    assert pool.take(2) is None
    pool.release(blocks)
    assert pool.take(2) is not None  # the fresh block, then the tail of the freed sequence
    assert pool.match(keys) == blocks[:1]


class BlockMachine(RuleBasedStateMachine):
    """Sequences that come, grow, share prefixes and go, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8, 2)
        self.sequences: list[tuple[list[int], list[bytes]]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=8))
    def start(self, tokens: list[int]) -> None:
        keys = _chain(tokens)
        prefix = self.pool.match(keys)
        need = len(keys) - len(prefix)
        if need > self.pool.num_free_beside(prefix):
            return
        self.pool.share(prefix)
        fresh = self.pool.take(need)
        assert fresh is not None
        for block, key in zip(fresh, keys[len(prefix) :], strict=True):
            self.pool.remember(block, key)
        self.sequences.append((prefix + fresh, keys))

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.sequences:
            index = data.draw(st.integers(0, len(self.sequences) - 1))
            self.pool.release(self.sequences.pop(index)[0])

    @invariant()
    def living_blocks_hold_their_own_prefix(self) -> None:
        content: dict[int, bytes] = {}
        for blocks, keys in self.sequences:
            assert len(set(blocks)) == len(blocks)
            for block, key in zip(blocks, keys, strict=True):
                assert content.setdefault(block, key) == key, "two prefixes in one block"
        assert self.pool.num_free == 8 - len(content)

    def teardown(self) -> None:
        for blocks, _ in self.sequences:
            self.pool.release(blocks)
        self.pool.check_integrity()


TestBlocks = BlockMachine.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
