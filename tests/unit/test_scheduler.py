"""The scheduler with a runner that only counts: who runs when, and that nothing is lost or starved."""

from __future__ import annotations

import contextlib
import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.adapters.pool import AdapterPool
from loramux.adapters.registry import Registry
from loramux.engine.blocks import BlockPool
from loramux.engine.places import Room
from loramux.engine.plan import PENDING, Row, Sampled, SampleSpec, StepPlan, StepResult
from loramux.engine.scheduler import Scheduler, SchedulerLimits
from loramux.engine.sequence import Sequence
from loramux.errors import InvalidField, PinRefused
from loramux.types import AdapterRef, AdapterUse, Request, SamplingParams


class World:
    """A scheduler, a clock in steps, and a device that loads adapters one step later.

    `ahead`: a step's result is read after the next one was planned and launched. `tenants`: adapters
    share by the first letter of their digests, else all requests are one tenant's.
    """

    def __init__(
        self,
        *,
        blocks: int = 64,
        block_size: int = 4,
        seqs: int = 8,
        tokens: int = 32,
        max_loras: int = 2,
        patience: float = 5.0,
        ahead: bool = False,
        tenants: bool = False,
    ):
        limits = SchedulerLimits(seqs, tokens, patience)
        self.pool = AdapterPool(max_loras, 8)
        self.scheduler = Scheduler(limits, BlockPool(blocks, block_size), self.pool)
        self.now = 0.0
        self.count = 0
        self.loading: list[str] = []
        self.limits = limits
        self.ahead = ahead
        self.tenants = tenants
        self.in_flight: StepPlan | None = None

    def add(
        self,
        prompt: list[int],
        answer: int = 4,
        adapters: tuple[tuple[str, float], ...] = (),
        starts: tuple[int | None, ...] = (),
    ) -> Sequence:
        refs = tuple((AdapterRef(d, d, "", 4, 1), scale) for d, scale in adapters)
        names = tuple(sorted({digest[0] for digest, _ in adapters})) if self.tenants else ()
        params = SamplingParams(max_tokens=answer)
        more = {"starts": starts, "tenants": names}
        request = Request(str(self.count), tuple(prompt), params, refs, **more)
        sequence = Sequence(self.count, request, 0, 0, queued_at=self.now)
        self.count += 1
        self.scheduler.add(sequence)
        return sequence

    def pin(self, *digests: str) -> None:
        self.scheduler.set_pins({d: AdapterRef(d, d, "", 4, 1) for d in digests})

    def step(self) -> StepPlan:
        self.now += 1
        for digest in self.loading:
            self.scheduler.loaded(digest)
        self.loading = []
        plan = self.scheduler.plan(self.now)
        self.loading = [load.ref.digest for load in self.scheduler.take_loads()]
        self.check(plan)
        self.scheduler.launched(plan)
        due, self.in_flight = (self.in_flight, plan) if self.ahead else (plan, None)
        if due is not None:
            self.commit(due)
        return plan

    def commit(self, plan: StepPlan) -> None:
        """Each token tells its position, so one that is lost or comes twice is seen."""
        result = {r.sequence_id: Sampled(_token(r, r.sample)) for r in plan.rows if r.sample}
        for sequence, sampled in self.scheduler.commit(plan, StepResult(result)):
            long = sequence.num_output >= (sequence.request.params.max_tokens or 0)
            if long or sampled.token_id in sequence.stop_ids:
                self.scheduler.finish(sequence, "length" if long else "stop")

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
            assert PENDING not in row.token_ids[:-1]
            if row.token_ids[-1] == PENDING:
                assert self.ahead and row.sample is not None and row.sample.pending
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
        if self.in_flight is not None:
            self.commit(self.in_flight)
            self.in_flight = None
        self.scheduler.check_integrity()


def _token(row: Row, spec: SampleSpec) -> int:
    return 7 + row.sequence_id + 1000 * spec.position


def _tokens(sequence: Sequence, count: int) -> list[int]:
    return [7 + sequence.sequence_id + 1000 * position for position in range(count)]


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


@pytest.mark.parametrize("ahead", [False, True])
def test_running_out_of_blocks_preempts_the_youngest_and_loses_nothing(ahead: bool) -> None:
    world = World(blocks=8, tokens=64, ahead=ahead)
    sequences = [world.add([i] * 10, answer=12) for i in range(4)]
    world.run()
    assert world.scheduler.preemptions > 0
    assert [s.num_output for s in sequences] == [12] * 4
    for s in sequences:
        assert s.output_ids == _tokens(s, 12)


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


@pytest.mark.parametrize("ahead", [False, True])
def test_no_adapter_starves_under_endless_traffic_for_another(ahead: bool) -> None:
    world = World(max_loras=1, seqs=4, patience=10, ahead=ahead)
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


@pytest.mark.parametrize("ahead", [False, True])
def test_a_full_queue_of_many_adapters_is_not_computed_twice(ahead: bool) -> None:
    """All lose patience; were they given way at once, most answers would begin anew and anew."""
    rng = random.Random(4)
    world = World(seqs=32, blocks=800, tokens=128, max_loras=8, patience=20, ahead=ahead)
    names = [f"{i}" for i in range(60)]
    weights = [1 / (1 + i) for i in range(60)]
    sequences = [
        world.add([i] * 24, answer=40, adapters=((rng.choices(names, weights)[0], 1.0),))
        for i in range(300)
    ]
    computed = 0
    while world.scheduler.has_work:
        computed += world.step().num_tokens
    assert all(sequence.finish_reason == "length" for sequence in sequences)
    assert computed < 1.1 * 300 * (24 + 40)


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


@settings(max_examples=200, deadline=None)
@given(
    ahead=st.booleans(),
    seed=st.integers(0, 10_000),
    blocks=st.integers(8, 40),
    max_loras=st.integers(1, 3),
    tokens=st.integers(3, 40),
    patience=st.sampled_from([0.0, 2.0, 30.0]),
    tenants=st.booleans(),
)
def test_everything_finishes_and_the_books_balance(
    ahead: bool, seed: int, blocks: int, max_loras: int, tokens: int, patience: float, tenants: bool
) -> None:
    rng = random.Random(seed)
    world = World(
        blocks=blocks,
        tokens=tokens,
        max_loras=max_loras,
        patience=patience,
        seqs=5,
        ahead=ahead,
        tenants=tenants,
    )
    alive: list[Sequence] = []
    for _ in range(40):
        if rng.random() < 0.5 and len(alive) < 12:
            names = rng.sample("abcde", rng.randint(0, max_loras))
            adapters = tuple((name, rng.choice([0.5, 1.0])) for name in names)
            prompt = [rng.randint(0, 2)] * rng.randint(1, 16)
            alive.append(world.add(prompt, answer=rng.randint(1, 12), adapters=adapters))
            if rng.random() < 0.3:  # ends before its length, which is known only afterwards
                stop = rng.randint(0, 11)
                alive[-1].stop_ids = (_tokens(alive[-1], 12)[stop],)
        if alive and rng.random() < 0.05:
            victim = alive.pop(rng.randrange(len(alive)))
            if victim.finish_reason is None:
                world.scheduler.finish(victim, "abort")
        if rng.random() < 0.1:
            world.pool.drop(rng.choice("abcde"))
        world.step()
    world.run(4000)
    for sequence in alive:
        tokens_ = _tokens(sequence, sequence.request.params.max_tokens or 0)
        for place, token in enumerate(tokens_):
            if token in sequence.stop_ids:
                tokens_ = tokens_[: place + 1]
        assert sequence.output_ids == tokens_


def test_the_last_token_is_not_followed_by_a_step() -> None:
    world = World(ahead=True)
    sequence = world.add([1] * 3, answer=2)
    assert [len(world.step().rows) for _ in range(3)] == [1, 1, 0]
    assert sequence.finish_reason == "length"


def test_a_stop_found_late_costs_one_row_and_publishes_nothing_of_it() -> None:
    world = World(ahead=True)
    sequence = world.add(list(range(6)), answer=10)
    sequence.stop_ids = (_tokens(sequence, 2)[1],)
    assert [len(world.step().rows) for _ in range(4)] == [1, 1, 1, 0]
    assert sequence.output_ids == _tokens(sequence, 2)
    # 6 + 1 tokens were computed with their values known: one block of 4.
    assert len(world.scheduler.blocks._key_of) == 1
    world.scheduler.check_integrity()


def test_a_token_that_arrives_after_a_preemption_is_kept() -> None:
    world = World(ahead=True)
    sequence = world.add([1] * 3, answer=5)
    world.step()
    world.scheduler._preempt(sequence, sequence.queued_at)
    assert not world.step().rows, "it must wait for its token"
    assert sequence.output_ids == _tokens(sequence, 1)
    world.run()
    assert sequence.output_ids == _tokens(sequence, 5)


def test_a_place_is_held_before_there_is_room_in_the_batch() -> None:
    world = World(seqs=1, max_loras=2)
    world.add([1] * 3, answer=10, adapters=(("a", 1.0),))
    world.step()
    waits = [world.add([1] * 3, adapters=((name, 1.0),)) for name in "bc"]
    world.step()
    assert (waits[0].held, waits[1].held) == (("b",), ())
    assert world.loading == ["b"]
    world.run()


def test_what_is_held_ahead_of_time_goes_to_an_older_one_that_lost_patience() -> None:
    world = World(seqs=2, max_loras=2, patience=3)
    world.add([1] * 3, answer=60, adapters=(("a", 1.0),))
    world.add([1] * 3, answer=60)
    world.step()
    both = world.add([1] * 3, answer=2, adapters=(("b", 1.0), ("c", 1.0)))
    world.add([1] * 3, answer=2, adapters=(("d", 1.0),))
    for _ in range(12):
        world.step()
    assert both.finish_reason == "length"
    world.run()


def test_limits_are_whole() -> None:
    with pytest.raises(AttributeError):
        World().limits.max_num_seqs = 3  # type: ignore[misc]


def test_a_pinned_adapter_is_there_before_it_is_asked_for_and_never_goes() -> None:
    world = World(max_loras=2)
    world.pin("p")
    world.step()
    assert world.loading == ["p"]
    for name in "abcd":
        world.add([1] * 3, adapters=((name, 1.0),))
        world.run()
        assert "p" in world.pool.resident()
    pinned = world.add([1] * 3, adapters=(("p", 1.0),))
    assert world.step().rows, "no load is waited for"
    world.run()
    assert pinned.num_output == 4


def test_a_pin_under_full_traffic_gets_its_place_and_nobody_starves() -> None:
    world = World(max_loras=2, patience=3)
    both = [world.add([1] * 3, answer=30, adapters=((name, 1.0),)) for name in "ab"]
    world.step()
    world.pin("p")
    others = [world.add([1] * 3, answer=3, adapters=((name, 1.0),)) for name in "cdpe"]
    world.run(400)
    assert "p" in world.pool.resident()
    assert all(s.finish_reason == "length" for s in [*both, *others])


def test_what_becomes_free_in_a_step_is_left_to_a_pin() -> None:
    world = World()
    a, b, p = (world.add([1] * 3, adapters=((name, 1.0),)) for name in "abp")
    room = Room({"a"}, 2, frozenset("p"))
    assert room.fits(a) and room.fits(p) and not room.fits(b)


@settings(max_examples=250, deadline=None)
@given(
    ahead=st.booleans(),
    seed=st.integers(0, 100_000),
    max_loras=st.integers(1, 4),
    patience=st.sampled_from([0.0, 2.0, 30.0]),
    tenants=st.booleans(),
)
def test_pins_replacements_and_sums_never_deadlock(
    ahead: bool, seed: int, max_loras: int, patience: float, tenants: bool
) -> None:
    """A registry decides who is pinned; requests, pins, replacements and unloads come in any order."""
    rng = random.Random(seed)
    world = World(max_loras=max_loras, patience=patience, seqs=4, ahead=ahead, tenants=tenants)
    world.scheduler.set_pins({})
    gone: list[str] = []
    registry = Registry(
        on_gone=gone.append,
        max_loras=max_loras,
        on_pins=lambda refs, granted: world.pin(*(refs[d].digest for d in sorted(granted))),
    )
    users: dict[Sequence, list[str]] = {}
    version = itertools.count()

    def settle() -> None:
        for sequence in [s for s in users if s.finish_reason is not None]:
            registry.release(users.pop(sequence))
        while gone:
            world.pool.drop(gone.pop())

    def publish(name: str) -> None:
        pinned = rng.choice([None, None, True, False])
        with contextlib.suppress(PinRefused):
            registry.publish(AdapterRef(name, f"{name}{next(version)}", "", 4, 1), pinned=pinned)

    everything: list[Sequence] = []
    for name in "abcde":
        publish(name)
    for _ in range(60):
        names = registry.names()
        chance = rng.random()
        if chance < 0.45 and names and len(users) < 10:
            uses = [
                AdapterUse(n) for n in rng.sample(names, rng.randint(1, min(len(names), max_loras)))
            ]
            with contextlib.suppress(InvalidField):
                refs = registry.acquire(uses)
                adapters = tuple((ref.digest, scale) for ref, scale in refs)
                sequence = world.add([rng.randint(0, 2)] * 5, rng.randint(1, 9), adapters)
                users[sequence] = [ref.digest for ref, _ in refs]
                everything.append(sequence)
        elif chance < 0.6:
            publish(rng.choice("abcde"))
        elif chance < 0.7 and names:
            with contextlib.suppress(PinRefused):
                registry.pin(rng.choice(names), rng.random() < 0.7)
        elif chance < 0.75 and names:
            registry.remove(rng.choice(names))
        world.step()
        settle()
    for _ in range(3000):
        if not users:
            break
        world.step()
        settle()
    assert not users, "something never finished"
    assert all(s.finish_reason == "length" for s in everything)
    for _ in range(4):
        world.step()
    pinned = {s.ref.digest for s in registry.statuses(bool, bool) if s.pinned}
    assert pinned == world.pool.pins <= set(world.pool.resident())
    registry.check_integrity()
    world.run()


class Computing(World):
    """With a KV cache: of each slot, everything that its keys and values were computed from."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.slots: dict[tuple[int, int], object] = {}

    def check(self, plan: StepPlan) -> None:
        """Run it."""
        super().check(plan)
        size = self.scheduler.blocks.block_size
        for row in plan.rows:
            sequence = self.scheduler._by_id[row.sequence_id]
            digest_at = {self.pool.row_of(digest): digest for digest in sequence.digests}
            members = [part for count, part in row.parts() for _ in range(count)]
            end = row.start + len(row.token_ids)
            for place in range(row.start, end):
                token = row.token_ids[place - row.start]
                if token == PENDING:
                    token = _tokens(sequence, place - sequence.num_prompt + 1)[-1]
                before = self.slots[_slot(row, place - 1, size)] if place else None
                own = members[place - row.start]
                applied = frozenset((digest_at[p], scale) for p, scale in own)
                self.slots[_slot(row, place, size)] = hash((before, token, applied))
            assert self.slots[_slot(row, end - 1, size)] == self.wanted(sequence, end)

    def wanted(self, sequence: Sequence, end: int) -> object:
        answer = _tokens(sequence, max(0, end - sequence.num_prompt))
        found: object = None
        for place, token in enumerate([*sequence.request.prompt_token_ids, *answer][:end]):
            pairs = zip(sequence.composition, sequence.starts, strict=True)
            applied = frozenset(member for member, start in pairs if start <= place)
            found = hash((found, token, applied))
        return found


def _slot(row: Row, place: int, size: int) -> tuple[int, int]:
    return row.block_table[place // size], place % size


@settings(max_examples=150, deadline=None)
@given(
    ahead=st.booleans(),
    seed=st.integers(0, 10_000),
    blocks=st.integers(12, 40),
    tokens=st.integers(3, 40),
    patience=st.sampled_from([0.0, 2.0, 30.0]),
)
def test_activated_adapters_read_what_was_computed_as_they_would(
    ahead: bool, seed: int, blocks: int, tokens: int, patience: float
) -> None:
    """Chunks, preemptions, evictions and shared prefixes: every token attends to keys and values that
    came about from the same tokens under the same adapters, each from its own beginning on."""
    rng = random.Random(seed)
    world = Computing(blocks=blocks, tokens=tokens, max_loras=3, patience=patience, ahead=ahead)
    alive: list[Sequence] = []
    for _ in range(60):
        if rng.random() < 0.5 and len(alive) < 14:
            prompt = [1] * rng.randint(1, 22)
            names = rng.sample("abcde", rng.randint(0, 3))
            adapters = tuple((name, rng.choice([0.5, 1.0])) for name in names)
            starts = tuple(rng.choice([0, None, rng.randrange(len(prompt))]) for _ in names)
            answer = rng.randint(1, 8)
            alive.append(world.add(prompt, answer=answer, adapters=adapters, starts=starts))
        if rng.random() < 0.1:
            world.pool.drop(rng.choice("abcde"))
        world.step()
    world.run(4000)
    for sequence in alive:
        assert sequence.output_ids == _tokens(sequence, sequence.request.params.max_tokens or 0)


def test_a_prefix_before_the_beginning_is_everybodys() -> None:
    world = World(max_loras=3, tokens=200)
    talk = list(range(22))
    world.add([*talk, 7, 7])
    world.run()
    asked = [
        world.add([*talk, 50, 60, 61], adapters=((name, 1.0),), starts=(22,)) for name in "abc"
    ]
    plain = world.add([*talk, 50, 60, 61], adapters=(("a", 1.0),))
    idle = world.add([*talk, 8, 8], adapters=(("b", 1.0),), starts=(None,))
    world.step()
    assert not idle.held and idle in world.scheduler.running, "it waits for no adapter"
    world.run()
    assert [sequence.num_cached for sequence in asked] == [20, 20, 20]
    assert plain.num_cached == 0 and idle.num_cached == 20
    once_more = world.add([*talk, 50, 60, 61, 3], adapters=(("a", 1.0),), starts=(22,))
    other = world.add([*talk, 50, 60, 61, 3], adapters=(("a", 0.5),), starts=(22,))
    world.run()
    assert (once_more.num_cached, other.num_cached) == (24, 20)
