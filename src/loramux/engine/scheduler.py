"""Which tokens run in the next step. Integers and dictionaries only; no torch.

    waiting --hold places, get blocks--> running --stop, length, cancel--> gone
       ^------------- preempted (blocks or places given back) --|

A sequence runs when it has blocks *and* its adapters are resident. Running decodes come first, then
running prefills and the queue: by turns between tenants (`fair_share`), for each in order of age. Where
seats or blocks are full, those above their share give way (`giving_way`). The oldest that have to wait
hold places all the same, so their adapters are on the device by the time they can run. A sequence whose
adapters find no place is passed by those behind it, but not for ever (`rotation`). The blocks of what
is put back stay in the prefix cache as long as it has room.

A step may be planned while the one before runs:

    plan 1, launched 1, plan 2, launched 2, commit 1, plan 3, launched 3, commit 2, ...

What step 1 chose is *pending* until it is committed. Nothing here depends on the value of a pending
token, only on their number, so the answers are those of plan, launched, commit, one after the other.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from loramux.adapters.pool import AdapterPool
from loramux.engine.blocks import BlockPool
from loramux.engine.encoder_cache import EncoderCache
from loramux.engine.fair_share import FairShare, Turns, virtual_time
from loramux.engine.giving_way import gives_blocks, gives_seat, may_take_blocks, may_take_seat
from loramux.engine.media_plan import MediaPlanner
from loramux.engine.places import Places, Room
from loramux.engine.plan import AdapterLoad, Sampled, StepPlan, StepResult
from loramux.engine.rotation import Rotation
from loramux.engine.rows import make_rows
from loramux.engine.sequence import Sequence
from loramux.types import AdapterRef, FinishReason

PREFETCHED = 64  # waiting sequences that may hold places before they can run
MOST_MET = 16  # groups that are asked for a claim to a seat in a step, while all are taken


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step; `adapter_patience_s` in seconds of the clock that `plan` is given."""

    max_num_seqs: int
    max_num_batched_tokens: int
    adapter_patience_s: float
    see_whole: bool = False  # tokens of an image see all of it: no step may cut one


@dataclass(slots=True)
class _Step:
    """A step in the making; `budget` are tokens that are left."""

    now: float
    budget: int
    scheduled: dict[Sequence, int] = field(default_factory=dict)
    short: bool = False  # blocks ran out for those that run: nobody is admitted

    def put_back(self, sequence: Sequence) -> None:
        """`sequence` is not in this step after all."""
        self.budget += self.scheduled.pop(sequence, 0)


class Scheduler:
    """Decides; owns the queue, the block pool and the adapter places."""

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockPool,
        adapters: AdapterPool | None,
        encoder: EncoderCache | None = None,
        fair: FairShare | None = None,
    ):
        self.limits = limits
        self.blocks = blocks
        self.adapters = adapters
        self.media = MediaPlanner(encoder, see_whole=limits.see_whole)
        self.waiting: list[Sequence] = []  # sorted by queued_at
        self.running: dict[Sequence, None] = {}  # in order of admission; values unused
        self.preemptions = 0
        self.fair = fair or FairShare()
        self._by_id: dict[int, Sequence] = {}  # waiting and running ones
        self._places = Places(adapters)
        patience_s = limits.adapter_patience_s
        self._rotation = Rotation(adapters, self._places, self._preempt, patience_s)

    # --- the queue -----------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        self._by_id[sequence.sequence_id] = sequence
        self.fair.enter(sequence)
        self._queue(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Take `sequence` out, wherever it is, and give back what it had.

        Its blocks may be taken at once even if a launched step still writes to them: every later
        step comes after that one.
        """
        sequence.finish_reason = reason
        if self._by_id.pop(sequence.sequence_id, None) is None:
            return
        if sequence in self.running:
            del self.running[sequence]
        else:
            self._unqueue(sequence)
        self.fair.leave(sequence)
        self._give_back(sequence)

    def take_loads(self) -> list[AdapterLoad]:
        """Adapters to bring to the device, decided since the last call."""
        return self._places.take_loads()

    def set_pins(self, refs: Mapping[str, AdapterRef]) -> None:
        """Pin exactly these versions, by digest: from the next step on, each gets a place and keeps
        it. Every sequence must fit beside them; see `adapters.pins`."""
        self._places.set_pins(refs)

    def loaded(self, digest: str) -> None:
        """An adapter has arrived on the device."""
        assert self.adapters is not None
        self.adapters.loaded(digest)

    def load_failed(self, digest: str) -> list[Sequence]:
        """An adapter did not arrive. Returns the sequences that wait for it, already taken out."""
        assert self.adapters is not None
        hit = [s for s in self.waiting if digest in s.held]
        for sequence in hit:
            self.finish(sequence, "error")
        self.adapters.load_failed(digest)
        return hit

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # --- a step --------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan:
        """The next step at time `now` (seconds). Empty when nothing can run yet."""
        self._places.place_pins()
        all_placed = self._rotation.run(self.waiting, self.running, now)
        step = _Step(now, self.limits.max_num_batched_tokens)
        self.media.begin()
        prefills = []
        for sequence in list(self.running):
            if (missing := sequence.length - sequence.num_computed) > 1:
                prefills.append(sequence)
            elif not sequence.ends_with_pending:
                self._go_on(sequence, min(missing, step.budget), step)
        room = self._places.room()
        room.closed = not all_placed
        if step.budget > 0 and (prefills or self.waiting):
            self._take_turns(prefills, step, room)
        for sequence in self.waiting[:PREFETCHED]:
            self._hold_places(sequence, now, room)
        rows = make_rows(step.scheduled, see_whole=self.limits.see_whole)
        return StepPlan(tuple(rows), *self.media.finish(rows), _pooled(step.scheduled))

    def launched(self, plan: StepPlan) -> None:
        """The plan is on its way: what is planned from now on comes after it."""
        for row in plan.rows:
            sequence = self._by_id[row.sequence_id]
            sequence.num_computed += len(row.token_ids)
            if row.sample is not None:
                sequence.num_pending += 1

    def commit(self, plan: StepPlan, result: StepResult) -> list[tuple[Sequence, Sampled]]:
        """Book what a launched step chose. Returns each sequence that got a token, with the token.

        One that has ended meanwhile gets nothing. One that was preempted does: its token was chosen
        as if nothing had happened.
        """
        size, advanced = self.blocks.block_size, []
        for row in plan.rows:
            sequence = self._by_id.get(row.sequence_id)
            if sequence is None:
                continue
            end = row.start + len(row.token_ids)
            # Less is computed if it was preempted while the step ran; then the blocks are gone.
            if row.start // size < end // size and sequence.num_computed >= end:
                self._remember(sequence, row.start // size, end // size)
            if row.sample is not None:
                sampled = result.sampled[row.sequence_id]
                sequence.tokens.append(sampled.token_id)
                sequence.num_pending -= 1
                advanced.append((sequence, sampled))
        return advanced

    def alive_in(self, plan: StepPlan) -> list[Sequence]:
        """The sequences of a plan that have not ended."""
        found = (self._by_id.get(row.sequence_id) for row in plan.rows)
        return [sequence for sequence in found if sequence is not None]

    def check_integrity(self) -> None:
        """With nothing queued, every block and place must be back."""
        assert not self.has_work and not self._by_id, "check_integrity needs an idle scheduler"
        self.fair.check_integrity()
        self.blocks.check_integrity()
        if self.adapters is not None:
            self.adapters.check_integrity()

    # --- running -------------------------------------------------------------------------------

    def _go_on(self, sequence: Sequence, count: int, step: _Step) -> None:
        """Schedule `count` more tokens of a sequence that runs, or as many as its media allow."""
        if count == 0 or sequence not in self.running:
            return  # no budget, or preempted by one before it
        count = sequence.in_one_row(sequence.num_computed, count)
        if sequence.items:
            count = self.media.count(sequence, sequence.num_computed, count)
            if count == 0:
                return  # its media are encoded in a later step
        step.budget -= count
        step.scheduled[sequence] = count
        end = sequence.num_computed + count
        self.fair.charge(sequence, end)
        if end > len(sequence.blocks) * self.blocks.block_size:
            self._grow(sequence, end, step)

    def _grow(self, sequence: Sequence, end: int, step: _Step) -> None:
        """Get blocks for positions up to `end`, preempting others that run, or `sequence` itself, if
        needed: of tenants above their share, or else the youngest."""
        missing = self.blocks.blocks_for(end) - len(sequence.blocks)
        while missing > 0 and sequence in step.scheduled:
            if (taken := self.blocks.take(missing)) is not None:
                sequence.set_blocks(sequence.blocks + taken)
                break
            step.short = True
            if not self._free_blocks(step, -math.inf):
                victim = next(reversed(self.running))
                step.put_back(victim)
                self._preempt(victim, victim.queued_at)

    def _free_blocks(self, step: _Step, behind: float) -> bool:
        """Put one back that has more than its share of the blocks, if there is any."""
        fair, total = self.fair, self.blocks.num_blocks
        if not fair.is_shared:
            return False
        return self._give_way(gives_blocks(fair, self.running, total, behind, step.now), step)

    def _give_way(self, victim: Sequence | None, step: _Step) -> bool:
        """Put `victim` back for another tenant."""
        if victim is None:
            return False
        victim.given_way += 1
        step.put_back(victim)
        self._preempt(victim, victim.queued_at)
        return True

    def _preempt(self, sequence: Sequence, queued_at: float) -> None:
        """Put a running sequence back into the queue; it will be computed again from the cache."""
        del self.running[sequence]
        self._give_back(sequence)
        sequence.num_computed = 0
        sequence.queued_at = queued_at
        self.preemptions += 1
        self._queue(sequence)

    def _queue(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.queued_at)
        self.fair.queue(sequence)

    def _unqueue(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.fair.unqueue(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        sequence.set_blocks([])
        self._places.release(sequence)

    def _remember(self, sequence: Sequence, first: int, end: int) -> None:
        """Publish the blocks [first, end), which a step has filled with known tokens."""
        if not self.blocks.enable_prefix_caching:
            return
        sequence.update_keys(self.blocks.block_size)
        for index in range(first, end):
            self.blocks.remember(sequence.blocks[index], sequence.keys[index])

    # --- admission -----------------------------------------------------------------------------

    def _take_turns(self, prefills: list[Sequence], step: _Step, room: Room) -> None:
        """Give what is left of the budget to prompts, those that wait and those that run."""
        with self.fair.turns(prefills) as turns:
            turns.closed = step.short or (self._is_full and not self.fair.is_shared)
            for sequence in turns:
                if turns.waits:
                    self._admit(sequence, step, room, turns)
                else:
                    missing = sequence.length - sequence.num_computed
                    self._go_on(sequence, self._part(sequence, missing, step, turns), step)
                if step.budget <= 0:
                    break
                if step.short or (self._is_full and turns.num_met >= MOST_MET):
                    turns.closed = True

    @property
    def _is_full(self) -> bool:
        return len(self.running) >= self.limits.max_num_seqs

    def _part(self, sequence: Sequence, missing: int, step: _Step, turns: Turns) -> int:
        """How many of the `missing` tokens of a prompt are in this step."""
        if missing <= step.budget or sequence.items or not self.fair.is_shared:
            return min(missing, step.budget)
        return step.budget - turns.kept_for_others(sequence, step.budget)

    def _admit(self, sequence: Sequence, step: _Step, room: Room, turns: Turns) -> None:
        """Start a waiting sequence if it can run; tell `turns` who need not be asked after it."""
        if sequence.elder is not None and not sequence.elder.prompt_can_be_shared:
            return  # its prompt is being computed by the first answer of the request
        if not self._hold_places(sequence, step.now, room):
            turns.skip_like(sequence)
            return
        if sequence.num_pending:
            return  # preempted a moment ago; all its tokens will be known in the next step
        if self._is_full:
            seats = self.limits.max_num_seqs
            if not may_take_seat(self.fair, sequence, seats):
                turns.skip_group()
                return
            behind = virtual_time(sequence), step.now
            if not self._give_way(gives_seat(self.fair, self.running, seats, *behind), step):
                turns.closed = True
                return
        if not self._start(sequence, step, turns):
            turns.closed = True  # no blocks: those behind must not overtake

    def _start(self, sequence: Sequence, step: _Step, turns: Turns) -> bool:
        """Give a waiting sequence its cached prefix and blocks, and schedule what it may compute."""
        prefix = sequence.cached_prefix(self.blocks)
        cached = len(prefix) * self.blocks.block_size
        members = self._places.members(sequence)
        count = self._part(sequence, sequence.num_tokens - cached, step, turns)
        count = sequence.in_one_row(cached, count)
        if sequence.items:
            count = self.media.count(sequence, cached, count, members)
            if count == 0:
                return False
        need = self.blocks.blocks_for(cached + count) - len(prefix)
        if not self._has_blocks(sequence, prefix, need, step):
            return False
        self.blocks.share(prefix)
        fresh = self.blocks.take(need)
        assert fresh is not None, "counted blocks are missing. This is a bug."
        sequence.set_blocks(prefix + fresh)
        sequence.members = members
        sequence.num_computed = cached
        if not sequence.admitted_once:
            sequence.admitted_once = True
            sequence.num_cached = cached
            self.blocks.queries += sequence.num_prompt
            self.blocks.hits += cached
        sequence.num_output_at_admission = sequence.num_output
        sequence.admitted_at = step.now
        sequence.charged = max(sequence.charged, cached)
        self._unqueue(sequence)
        self.running[sequence] = None
        step.scheduled[sequence] = count
        step.budget -= count
        self.fair.charge(sequence, cached + count)
        return True

    def _has_blocks(self, sequence: Sequence, prefix: list[int], need: int, step: _Step) -> bool:
        """Whether `need` blocks are free beside `prefix`, if need be since others give way."""
        blocks, fair = self.blocks, self.fair
        if need <= blocks.num_free_beside(prefix):
            return True
        in_all, total = need + len(prefix), blocks.num_blocks
        if not (fair.is_shared and may_take_blocks(fair, sequence, self.running, in_all, total)):
            return False
        while need > blocks.num_free_beside(prefix):
            if not self._free_blocks(step, virtual_time(sequence)):
                return False
        return True

    def _hold_places(self, sequence: Sequence, now: float, room: Room) -> bool:
        """Whether every adapter of `sequence` is resident; asks for those that are not."""
        if not sequence.digests:
            return True
        if not sequence.held:
            if not room.fits(sequence):
                room.closed = room.closed or self._rotation.is_impatient(sequence, now)
                return False
            self._places.hold(sequence, now)
            room.held.update(sequence.digests)
        return self._places.are_resident(sequence)


def _pooled(scheduled: dict[Sequence, int]) -> tuple[int, ...]:
    """Those that end with the tokens they have been given."""
    ending = (s for s, n in scheduled.items() if s.pools and s.num_computed + n == s.length)
    return tuple(sequence.sequence_id for sequence in ending)
