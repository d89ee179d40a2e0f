"""The scheduler with a runner that only counts: who runs when, and that nothing is lost or starved."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.adapters.pool import AdapterPool
from loramux.engine.blocks import BlockPool
from loramux.engine.plan import Sampled, StepPlan, StepResult
from loramux.engine.scheduler import Scheduler, SchedulerLimits
from loramux.engine.sequence import Sequence
from loramux.types import AdapterRef, Request, SamplingParams


class World:
    """A scheduler, a clock in steps, and a device that loads adapters one step later."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        block_size: int = 4,
        seqs: int = 8,
        tokens: int = 32,
        max_loras: int = 2,
        patience: float = 5.0,
    ):
        limits = SchedulerLimits(seqs, tokens, patience)
        self.pool = AdapterPool(max_loras, 8)
        self.scheduler = Scheduler(limits, BlockPool(blocks, block_size), self.pool)
        self.now = 0.0
        self.count = 0
        self.loading: list[str] = []
        self.limits = limits

    def add(
        self, prompt: list[int], answer: int = 4, adapters: tuple[tuple[str, float], ...] = ()
    ) -> Sequence:
        refs = tuple((AdapterRef(d, d, "", 4, 1), scale) for d, scale in adapters)
        request = Request(str(self.count), tuple(prompt), SamplingParams(max_tokens=answer), refs)
        sequence = Sequence(self.count, request, 0, 0, queued_at=self.now)
        self.count += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> StepPlan:
        self.now += 1
        for digest in self.loading:
            self.scheduler.loaded(digest)
        self.loading = []
        plan = self.scheduler.plan(self.now)
        self.loading = [load.ref.digest for load in self.scheduler.take_loads()]
        self.check(plan)
        result = StepResult(
            {row.sequence_id: Sampled(7 + row.sequence_id) for row in plan.rows if row.sample}
        )
        for sequence, _ in self.scheduler.commit(plan, result):
            if sequence.num_output >= (sequence.request.params.max_tokens or 0):
                self.scheduler.finish(sequence, "length")
        return plan

    def check(self, plan: StepPlan) -> None:
        """What must hold in every step, whatever was asked."""
        assert plan.num_tokens <= self.limits.max_num_batched_tokens
        assert len(plan.rows) <= self.limits.max_num_seqs
        assert len({row.sequence_id for row in plan.rows}) == len(plan.rows)
        assert len({place for row in plan.rows for place, _ in row.members}) <= self.pool.max_loras
        members = [row.members for row in plan.rows]
        assert members == sorted(members), "equal compositions are not neighbours"
        written: set[tuple[int, int]] = set()
        size = self.scheduler.blocks.block_size
        for row in plan.rows:
            assert row.token_ids, "an empty row"
            for p in range(row.start, row.start + len(row.token_ids)):
                place = (row.block_table[p // size], p % size)
                assert place not in written, "two rows write one slot"
                written.add(place)

    def run(self, steps: int = 500) -> None:
        for _ in range(steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "something never finished"
        self.scheduler.check_integrity()


def test_long_prompts_are_chunked_and_decodes_go_first() -> None:
    world = World(tokens=8)
    first = world.add([1] * 5)
    world.step()
    assert first.num_output == 1
    world.add([2] * 20)
    plan = world.step()
    assert sorted(len(row.token_ids) for row in plan.rows) == [1, 7]
    world.run()


def test_equal_prefixes_share_blocks_within_one_composition_only() -> None:
    world = World()
    prompt = list(range(20))
    world.add(prompt)
    world.run()
    for adapters, cached in [((), 16), ((("a", 1.0),), 0), ((("a", 1.0),), 16), ((("a", 0.5),), 0)]:
        sequence = world.add(prompt, adapters=adapters)
        world.run()
        assert sequence.num_cached == cached, adapters


def test_running_out_of_blocks_preempts_the_youngest_and_loses_nothing() -> None:
    world = World(blocks=8, tokens=64)
    sequences = [world.add([i] * 10, answer=12) for i in range(4)]
    world.run()
    assert world.scheduler.preemptions > 0
    assert [s.num_output for s in sequences] == [12] * 4
    for s in sequences:
        assert s.output_ids == [7 + s.sequence_id] * 12


def test_base_requests_pass_those_that_wait_for_a_place() -> None:
    world = World(max_loras=1, patience=1000)
    world.add([1] * 3, answer=50, adapters=(("a", 1.0),))
    world.step()
    waits = world.add([1] * 3, adapters=(("b", 1.0),))
    base = world.add([1] * 3, answer=2)
    for _ in range(6):
        world.step()
    assert base.finish_reason == "length"
    assert waits.num_output == 0
    world.run()


def test_an_adapter_is_used_only_after_it_has_arrived() -> None:
    world = World()
    sequence = world.add([1] * 3, adapters=(("a", 1.0), ("b", 0.5)))
    assert not world.step().rows
    assert world.loading == ["a", "b"]
    plan = world.step()
    assert plan.rows[0].members == ((0, 1.0), (4, 0.5))
    assert sequence.num_output == 1
    world.run()


def test_no_adapter_starves_under_endless_traffic_for_another() -> None:
    world = World(max_loras=1, seqs=4, patience=10)
    rare = None
    for step in range(120):
        if len(world.scheduler.running) + len(world.scheduler.waiting) < 6:
            world.add([step % 5] * 4, answer=1000, adapters=(("busy", 1.0),))
        if step == 20:
            rare = world.add([9] * 4, answer=3, adapters=(("rare", 1.0),))
        world.step()
        if rare is not None and rare.finish_reason:
            break
    assert rare is not None and rare.finish_reason == "length"
    assert world.now < 20 + 10 + 20
    busy = [*world.scheduler.running, *world.scheduler.waiting]
    for sequence in busy:
        world.scheduler.finish(sequence, "abort")
    while world.loading:
        world.step()
    world.scheduler.check_integrity()


def test_a_load_that_fails_takes_out_exactly_its_requests() -> None:
    world = World()
    doomed = world.add([1] * 3, adapters=(("a", 1.0), ("b", 1.0)))
    fine = world.add([1] * 3, adapters=(("b", 1.0),))
    world.scheduler.plan(1.0)
    assert [load.ref.digest for load in world.scheduler.take_loads()] == ["a", "b"]
    assert world.scheduler.load_failed("a") == [doomed]
    world.loading = ["b"]
    world.run()
    assert (doomed.finish_reason, fine.finish_reason) == ("error", "length")


def test_answers_of_one_request_share_its_prompt() -> None:
    world = World()
    elder = world.add(list(range(20)))
    sibling = Sequence(99, elder.request, 1, 1, queued_at=world.now, elder=elder)
    world.scheduler.add(sibling)
    assert len(world.step().rows) == 1
    assert [len(row.token_ids) for row in world.step().rows] == [1, 4]
    assert sibling.num_cached == 16
    world.run()


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    blocks=st.integers(8, 40),
    max_loras=st.integers(1, 3),
    tokens=st.integers(3, 40),
    patience=st.sampled_from([0.0, 2.0, 30.0]),
)
def test_everything_finishes_and_the_books_balance(
    seed: int, blocks: int, max_loras: int, tokens: int, patience: float
) -> None:
    rng = random.Random(seed)
    world = World(blocks=blocks, tokens=tokens, max_loras=max_loras, patience=patience, seqs=5)
    alive: list[Sequence] = []
    for _ in range(40):
        if rng.random() < 0.5 and len(alive) < 12:
            names = rng.sample("abcde", rng.randint(0, max_loras))
            adapters = tuple((name, rng.choice([0.5, 1.0])) for name in names)
            prompt = [rng.randint(0, 2)] * rng.randint(1, 16)
            alive.append(world.add(prompt, answer=rng.randint(1, 12), adapters=adapters))
        if alive and rng.random() < 0.05:
            victim = alive.pop(rng.randrange(len(alive)))
            if victim.finish_reason is None:
                world.scheduler.finish(victim, "abort")
        if rng.random() < 0.1:
            world.pool.drop(rng.choice("abcde"))
        world.step()
    world.run(4000)
    for sequence in alive:
        assert sequence.output_ids == [7 + sequence.sequence_id] * sequence.num_output
        assert sequence.num_output == sequence.request.params.max_tokens


def test_limits_are_whole() -> None:
    with pytest.raises(AttributeError):
        World().limits.max_num_seqs = 3  # type: ignore[misc]
