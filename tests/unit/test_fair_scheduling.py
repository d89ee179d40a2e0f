"""Fairness of the whole scheduler, on a clock on which each step takes as long as it would on a GPU."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.adapters.pool import AdapterPool
from loramux.engine.blocks import BlockPool
from loramux.engine.fair_share import FairShare
from loramux.engine.plan import Sampled, StepPlan, StepResult
from loramux.engine.scheduler import Scheduler, SchedulerLimits
from loramux.engine.sequence import Sequence
from loramux.types import AdapterRef, Request, SamplingParams

STEP_S, TOKEN_S, LOAD_S = 5.2e-3, 22e-6, 1.5e-3


@dataclass
class Load:
    """What one tenant sends: `rate` requests a second at random moments; adapters may be several."""

    tenant: str
    rate: float
    prompt: int = 100
    answer: int = 64


@dataclass
class Sim:
    """A scheduler and a device; each step takes `STEP_S`, and `TOKEN_S` for each token."""

    seats: int = 32
    budget: int = 512
    blocks: int = 4000
    block_size: int = 16
    max_loras: int = 8
    patience_s: float = 2.0
    weights: dict[str, float] = field(default_factory=dict)
    ahead: bool = True
    fair: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        limits = SchedulerLimits(self.seats, self.budget, self.patience_s)
        share = FairShare(lambda name: self.weights.get(name, 1.0))
        self.pool = AdapterPool(self.max_loras, 8)
        blocks = BlockPool(self.blocks, self.block_size)
        self.scheduler = Scheduler(limits, blocks, self.pool, fair=share)
        self.dice = random.Random(self.seed)
        self.now = 0.0
        self.ids = count()
        self.first: dict[str, list[float]] = {}
        self.tokens: dict[str, int] = {}
        self.computed = 0
        self.arriving: list[tuple[float, str]] = []
        self.in_flight: tuple[StepPlan, float] | None = None
        self.device_free = 0.0
        self.sequences: list[Sequence] = []

    def add(self, tenant: str, prompt: int, answer: int, at: float | None = None) -> Sequence:
        names = tuple(sorted(set(tenant.split("+")))) if tenant else ()
        refs = tuple((AdapterRef(name, f"digest-{name}", "", 4, 1), 1.0) for name in names)
        tokens = tuple(self.dice.randrange(100_000) for _ in range(prompt))
        number = next(self.ids)
        params = SamplingParams(max_tokens=answer)
        shared = names if self.fair else ()
        request = Request(str(number), tokens, params, refs, tenants=shared)
        at = self.now if at is None else at
        sequence = Sequence(number, request, 0, 0, queued_at=at)
        self.scheduler.add(sequence)
        self.sequences.append(sequence)
        return sequence

    def run(self, loads: list[Load], seconds: float) -> None:
        arrivals = []
        for load in loads:
            at = self.dice.expovariate(load.rate)
            while at < seconds:
                arrivals.append((at, load))
                at += self.dice.expovariate(load.rate)
        arrivals.sort(key=lambda arrival: arrival[0], reverse=True)
        while self.now < seconds:
            while arrivals and arrivals[-1][0] <= self.now:
                at, load = arrivals.pop()
                self.add(load.tenant, load.prompt, load.answer, at)
            if not self.step():
                self.now = min(
                    [at for at, _ in self.arriving] + [arrivals[-1][0] if arrivals else seconds]
                )

    def step(self) -> bool:
        """Plan and launch a step, and read one; false if there was nothing to do."""
        for arrival in [a for a in self.arriving if a[0] <= self.now]:
            self.arriving.remove(arrival)
            self.scheduler.loaded(arrival[1])
        plan = self.scheduler.plan(self.now)
        for load in self.scheduler.take_loads():
            self.arriving.append((self.now + LOAD_S, load.ref.digest))
        launched = None
        if plan.rows:
            start = max(self.now, self.device_free)
            self.device_free = start + STEP_S + TOKEN_S * plan.num_tokens
            self.computed += plan.num_tokens
            self.scheduler.launched(plan)
            launched = plan, self.device_free
        due, self.in_flight = (self.in_flight, launched) if self.ahead else (launched, None)
        if due is not None:
            self.now = max(self.now, due[1])
            self._commit(due[0])
        return due is not None or launched is not None

    def _commit(self, plan: StepPlan) -> None:
        sampled = {row.sequence_id: Sampled(7) for row in plan.rows if row.sample is not None}
        for sequence, _ in self.scheduler.commit(plan, StepResult(sampled)):
            tenant = "+".join(ref.name for ref, _ in sequence.request.adapters)
            self.tokens[tenant] = self.tokens.get(tenant, 0) + 1
            if sequence.num_output == 1:
                waited = self.now - sequence.request.arrival_s - sequence.queued_at
                self.first.setdefault(tenant, []).append(waited)
            if sequence.num_output >= (sequence.request.params.max_tokens or 0):
                self.scheduler.finish(sequence, "length")

    def finish(self) -> None:
        """Until nothing is left."""
        for _ in range(20_000):
            if not self.scheduler.has_work and self.in_flight is None:
                break
            if not self.step():
                self.now = min((at for at, _ in self.arriving), default=self.now + 0.1)
        self.scheduler.check_integrity()

    def p95(self, tenant: str) -> float:
        waits = sorted(self.first[tenant])
        return waits[int(0.95 * len(waits))]


QUIET = [Load(name, rate=2.0) for name in ("", "q1", "q2")]


def solo_p95(load: Load, seconds: float = 30.0, **how: Any) -> float:
    sim = Sim(**how)
    sim.run([load], seconds)
    return sim.p95(load.tenant)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("answer", [64, 600])
def test_others_hardly_wait_longer_for_one_that_sends_fifty_times_as_much(
    answer: int, ahead: bool
) -> None:
    """The busy one fills seats and queue for good, with short answers or such as do not end soon."""
    busy = Load("busy", 100.0, answer=answer)
    sim = Sim(ahead=ahead)
    sim.run([*QUIET, busy], 30.0)
    for load in QUIET:
        assert len(sim.first[load.tenant]) > 40, "enough to have a p95"
        assert sim.p95(load.tenant) <= 2 * solo_p95(load, ahead=ahead)
    assert len(sim.scheduler.waiting) > 500, "the busy one was not held back by its own rate"


def test_without_tenants_the_same_traffic_makes_others_wait() -> None:
    sim = Sim(fair=False)
    sim.run([*QUIET, Load("busy", 100.0)], 20.0)
    for load in QUIET:
        assert sim.p95(load.tenant) > 20 * solo_p95(load)


def test_the_busy_one_has_all_that_others_leave() -> None:
    alone, beside = Sim(), Sim()
    alone.run([Load("busy", 100.0)], 20.0)
    beside.run([Load("busy", 100.0), QUIET[0]], 20.0)
    assert sum(beside.tokens.values()) > 0.95 * alone.tokens["busy"]
    assert beside.computed < 1.05 * alone.computed, "little is computed twice"


@pytest.mark.parametrize("weight", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("answers", [(64, 64), (16, 200)])
def test_saturated_tenants_get_tokens_by_their_weights(
    weight: float, answers: tuple[int, int]
) -> None:
    """Whatever the lengths of their prompts and answers; the tokens of both count."""
    sim = Sim(weights={"a": weight})
    for tenant, answer in zip("ab", answers, strict=True):
        for _ in range(1500):
            sim.add(tenant, 100, answer, at=0.0)
    sim.run([], 5.0)
    a, b = (next(t for t in sim.scheduler.fair.standing() if t.name == name) for name in "ab")
    assert min(a.waiting, b.waiting) > 100, "both are backlogged"
    assert a.tokens / b.tokens == pytest.approx(weight, rel=0.08)


def test_long_prompts_of_one_do_not_delay_small_ones_of_others() -> None:
    """Prompts of 100 steps each; the small ones get in beside the next part."""
    sim = Sim(blocks=30_000)
    sim.run([Load("busy", 1.0, prompt=51_200, answer=4), *QUIET], 30.0)
    step_s = STEP_S + 512 * TOKEN_S
    for load in QUIET:
        assert sim.p95(load.tenant) < 3.2 * step_s, "one in flight, one launched, its own"
    unfair = Sim(blocks=30_000, fair=False)
    unfair.run([Load("busy", 1.0, prompt=51_200, answer=4), *QUIET], 30.0)
    assert unfair.p95("q1") > 100 * step_s


@pytest.mark.parametrize("ahead", [False, True])
def test_when_blocks_are_full_those_above_their_share_give_way(ahead: bool) -> None:
    """Half of the busy one's seats would fill the cache; a quiet one does not wait for its answers."""
    sim = Sim(blocks=500, ahead=ahead)
    sim.run([Load("busy", 40.0, answer=400), *QUIET], 30.0)
    for load in QUIET:
        assert sim.p95(load.tenant) <= 3 * solo_p95(load, ahead=ahead)
    unfair = Sim(blocks=500, ahead=ahead, fair=False)
    unfair.run([Load("busy", 40.0, answer=400), *QUIET], 30.0)
    assert unfair.p95("q1") > 20 * solo_p95(QUIET[1], ahead=ahead)
    assert sum(sim.tokens.values()) > 0.9 * sum(unfair.tokens.values()), "nothing thrashes"


def test_a_sum_of_adapters_counts_for_each_of_them() -> None:
    """`a+b` beside a busy `a` has the turns of the busy one; beside `c` it is the quiet one."""
    sim = Sim()
    sim.run([Load("a", 100.0), Load("a+b", 1.0), Load("c", 1.0)], 20.0)
    assert sim.p95("c") < 0.1
    a, b = (next(t for t in sim.scheduler.fair.standing() if t.name == name) for name in "ab")
    assert a.tokens > 10 * b.tokens > 0


def test_few_places_and_a_busy_tenant_starve_nobody() -> None:
    """Two places, six adapters: they rotate, and each gets answers all along."""
    sim = Sim(max_loras=2, patience_s=0.2)
    sim.run([Load("busy", 100.0), *(Load(f"q{i}", 1.0) for i in range(5))], 30.0)
    for i in range(5):
        assert sim.p95(f"q{i}") < 3.0
    assert sim.tokens["busy"] > sum(sim.tokens.values()) / 2


def test_many_tenants_at_once_are_not_computed_twice() -> None:
    sim = Sim(max_loras=8, patience_s=1.0, seats=32)
    weights = [1 / (1 + i) for i in range(60)]
    for _ in range(300):
        sim.add(f"{sim.dice.choices(range(60), weights)[0]}", 100, 60)
    sim.finish()
    assert sim.computed < 1.1 * 300 * 160


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 100_000),
    ahead=st.booleans(),
    seats=st.integers(1, 6),
    budget=st.sampled_from([6, 20, 200]),
    blocks=st.integers(8, 30),
    max_loras=st.integers(2, 4),
    patience_s=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_everything_ends_whatever_comes(
    seed: int,
    ahead: bool,
    seats: int,
    budget: int,
    blocks: int,
    max_loras: int,
    patience_s: float,
) -> None:
    """Random tenants, weights, sums, pins and cancellations, with too little of everything."""
    sim = Sim(
        seats=seats,
        budget=budget,
        blocks=blocks,
        block_size=4,
        max_loras=max_loras,
        patience_s=patience_s,
        ahead=ahead,
        seed=seed,
    )
    run_at_random(sim)


def run_at_random(sim: Sim) -> None:
    dice = random.Random(sim.seed)
    sim.weights |= {name: dice.choice([0.1, 1.0, 7.0]) for name in "abcde"}
    most = min(60, sim.blocks * sim.block_size) - 1
    for _ in range(60):
        for _ in range(dice.choice([0, 0, 1, 1, 4])):
            names = dice.sample("abcde", dice.randint(0, min(2, sim.max_loras - 1)))
            prompt = dice.randint(1, most // 2)
            sim.add("+".join(names), prompt, dice.randint(1, most - prompt))
        if sim.sequences and dice.random() < 0.1:
            victim = dice.choice(sim.sequences)
            if victim.finish_reason is None:
                sim.scheduler.finish(victim, "abort")
        if dice.random() < 0.1:
            pins = dice.sample("abcde", dice.randint(0, sim.max_loras - 2))
            refs = [AdapterRef(name, f"digest-{name}", "", 4, 1) for name in pins]
            sim.scheduler.set_pins({ref.digest: ref for ref in refs})
        if not sim.step():
            sim.now += 0.01
    sim.scheduler.set_pins({})
    sim.finish()
    for sequence in sim.sequences:
        whole = sequence.num_output == sequence.request.params.max_tokens
        assert whole or sequence.finish_reason == "abort"
