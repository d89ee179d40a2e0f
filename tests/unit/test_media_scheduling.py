"""Sequences with media in the scheduler: with a device that remembers what was encoded."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.adapters.pool import AdapterPool
from loramux.engine.blocks import BlockPool
from loramux.engine.encoder_cache import EncoderCache
from loramux.engine.media_spans import vectors_between
from loramux.engine.plan import Sampled, StepPlan, StepResult
from loramux.engine.scheduler import Scheduler, SchedulerLimits
from loramux.engine.sequence import Sequence
from loramux.types import AdapterRef, MediaItem, MediaPrompt, Request, SamplingParams


class World:
    """A scheduler whose steps are checked against the prompts themselves."""

    def __init__(self, *, see_whole: bool = False, room: int = 24, tokens: int = 16):
        limits = SchedulerLimits(4, tokens, 5.0, see_whole)
        self.encoder = EncoderCache(room, 12)
        self.scheduler = Scheduler(limits, BlockPool(40, 4), AdapterPool(2, 8), self.encoder)
        self.see_whole = see_whole
        self.vectors: dict[str, int] = {}
        self.computed: dict[int, int] = {}
        self.encoded: list[str] = []
        self.now = 0.0
        self.count = 0
        self.loading: list[str] = []

    def add(
        self,
        items: tuple[MediaItem, ...],
        length: int,
        adapters: tuple[tuple[AdapterRef, float], ...] = (),
        answer: int = 3,
    ) -> Sequence:
        prompt = tuple(range(length))
        media = MediaPrompt(prompt, items)
        params = SamplingParams(max_tokens=answer)
        request = Request(str(self.count), prompt, params, adapters, media=media)
        sequence = Sequence(self.count, request, 0, 0, queued_at=self.now)
        self.count += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> StepPlan:
        self.now += 1
        for digest in self.loading:
            self.scheduler.loaded(digest)
        plan = self.scheduler.plan(self.now)
        self.loading = [load.ref.digest for load in self.scheduler.take_loads()]
        self.check(plan)
        self.scheduler.launched(plan)
        result = {r.sequence_id: Sampled(7) for r in plan.rows if r.sample}
        for sequence, _ in self.scheduler.commit(plan, StepResult(result)):
            if sequence.num_output >= (sequence.request.params.max_tokens or 0):
                self.scheduler.finish(sequence, "length")
        return plan

    def check(self, plan: StepPlan) -> None:
        for key in plan.forget:
            self.vectors.pop(key, None)
        for one in plan.encode:
            assert one.key not in self.vectors
            self.vectors[one.key] = one.item.num_vectors
            self.encoded.append(one.key)
        assert sum(self.vectors.values()) <= self.encoder.capacity
        for row in plan.rows:
            sequence = self.scheduler._by_id[row.sequence_id]
            end = row.start + len(row.token_ids)
            wanted = sorted(
                (token - row.start, vector, count, item.digest)
                for item in sequence.items
                for token, vector, count in vectors_between(item, row.start, end)
            )
            given = row.media.vectors if row.media else ()
            assert wanted == sorted((at, v, n, key.split("(")[0]) for key, v, n, at in given)
            for key, vector, count, _ in given:
                assert vector + count <= self.vectors[key]
            if self.see_whole:
                assert not any(a < end < b for item in sequence.items for a, b in item.spans)

    def run(self, most: int = 400) -> None:
        for _ in range(most):
            if not self.scheduler.has_work:
                self.scheduler.check_integrity()
                return
            self.step()
        pytest.fail("somebody waits for ever")


def image(digest: str, *spans: tuple[int, int]) -> MediaItem:
    return MediaItem("image", digest, spans, {})


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.booleans())
def test_everybody_gets_the_vectors_of_their_prompt(seed: int, see_whole: bool) -> None:
    dice = random.Random(seed)
    world = World(see_whole=see_whole)
    plain = AdapterRef("p", "p", "", 4, 1)
    tower = AdapterRef("t", "t", "", 4, 1, adapts_encoder=True)
    for _ in range(dice.randint(1, 10)):
        at, items = 0, []
        for _ in range(dice.randint(0, 3)):
            at += dice.randint(0, 6)
            size = dice.randint(1, 10)
            # An item has one size wherever it stands.
            items.append(image(f"{dice.randint(0, 2)}-{size}", (at, at + size)))
            at += size
        adapters = dice.choice([(), ((plain, 1.0),), ((tower, 1.0),), ((plain, 0.5), (tower, 2.0))])
        world.add(tuple(items), at + dice.randint(1, 8), adapters, dice.randint(1, 5))
        for _ in range(dice.randint(0, 3)):
            world.step()
    world.run()


def test_one_encoding_serves_all_whose_adapters_leave_the_encoder_alone() -> None:
    plain = AdapterRef("p", "p", "", 4, 1)
    tower = AdapterRef("t", "t", "", 4, 1, adapts_encoder=True)
    world = World()
    for adapters in ((), ((plain, 1.0),), ((tower, 1.0),), ((tower, 1.0), (plain, 1.0))):
        world.add((image("a", (2, 8)),), 12, adapters)
        world.run()
    assert world.encoded == ["a", "a(('t', 1.0),)"]
    assert (world.encoder.queries, world.encoder.hits) == (4, 2)


def test_members_of_an_encoding_are_the_places_of_the_adapters_that_touch_it() -> None:
    plain = AdapterRef("p", "p", "", 4, 1)
    tower = AdapterRef("t", "t", "", 4, 1, adapts_encoder=True)
    world = World()
    sequence = world.add((image("a", (0, 4)),), 8, ((plain, 1.0), (tower, 0.5)))
    plans = [world.step() for _ in range(2)]
    (encode,) = plans[1].encode
    by_digest = dict(zip(sequence.digests, plans[1].rows[0].members, strict=True))
    assert encode.members == (by_digest["t"],)


def test_a_prefix_is_found_again_only_with_the_same_media() -> None:
    world = World()
    world.add((image("a", (2, 8)),), 14)
    world.run()
    same = world.add((image("a", (2, 8)),), 14)
    world.run()
    other = world.add((image("b", (2, 8)),), 14)
    world.run()
    assert (same.num_cached, other.num_cached) == (12, 0)
    assert world.encoded == ["a", "b"], "what the cache holds need not be encoded"


def test_an_image_that_must_be_seen_whole_waits_for_a_step_that_takes_it() -> None:
    world = World(see_whole=True, tokens=10)
    world.add((image("a", (6, 15)),), 20)
    lengths = [len(world.step().rows[0].token_ids) for _ in range(3)]
    assert lengths == [6, 10, 4]


def test_what_was_lost_is_encoded_again() -> None:
    world = World()
    world.add((image("a", (0, 12)), image("b", (13, 17))), 24)
    world.step()
    world.encoder.lose_all()
    plan = world.step()
    assert [one.key for one in plan.encode] == ["b"] and "a" in plan.forget
    world.run()
