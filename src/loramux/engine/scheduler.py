"""Which tokens run in the next step. Integers and dictionaries only; no torch.

    waiting --hold places, get blocks--> running --stop, length, cancel--> gone
       ^------------- preempted (blocks or places given back) --|

A sequence runs when it has blocks *and* its adapters are resident. Running decodes come first, then
running prefills, then the queue in order of age. The oldest that have to wait hold places all the
same, so their adapters are on the device by the time they can run. A waiting sequence whose adapters
find no place is passed by those behind it, but not for ever: after `adapter_patience_s` the adapters
that were held longest give way to it, and their sequences go back to the queue: those that came
later, and those that had their turn (their blocks stay in the prefix cache as long as it has room).

A step may be planned while the one before runs:

    plan 1, launched 1, plan 2, launched 2, commit 1, plan 3, launched 3, commit 2, ...

What step 1 chose is *pending* until it is committed. Nothing here depends on the value of a pending
token, only on their number, so the answers are those of plan, launched, commit, one after the other.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass

from loramux.adapters.pool import AdapterPool
from loramux.config import EngineConfig
from loramux.config.facts import EncoderFacts
from loramux.config.memory import affine_shift
from loramux.engine.blocks import BlockPool
from loramux.engine.encoder_cache import EncoderCache
from loramux.engine.media_plan import MediaPlanner
from loramux.engine.places import Places, Room
from loramux.engine.plan import AdapterLoad, Row, Sampled, StepPlan, StepResult
from loramux.engine.rows import make_row
from loramux.engine.sequence import Sequence
from loramux.types import AdapterRef, FinishReason

PREFETCHED = 64  # waiting sequences that may hold places before they can run
FEW = 8  # running sequences: with so many, turns are as long as the patience


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step; `adapter_patience_s` in seconds of the clock that `plan` is given."""

    max_num_seqs: int
    max_num_batched_tokens: int
    adapter_patience_s: float
    see_whole: bool = False  # tokens of an image see all of it: no step may cut one


class Scheduler:
    """Decides; owns the queue, the block pool and the adapter places."""

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockPool,
        adapters: AdapterPool | None,
        encoder: EncoderCache | None = None,
    ):
        self.limits = limits
        self.blocks = blocks
        self.adapters = adapters
        self.media = MediaPlanner(encoder, see_whole=limits.see_whole)
        self.waiting: list[Sequence] = []  # sorted by queued_at
        self.running: dict[Sequence, None] = {}  # in order of admission; values unused
        self.preemptions = 0
        self._by_id: dict[int, Sequence] = {}  # waiting and running ones
        self._places = Places(adapters)

    # --- the queue -----------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        self._by_id[sequence.sequence_id] = sequence
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
            self.waiting.remove(sequence)
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
        self._rotate_for_the_impatient(now)
        preemptions, size = self.preemptions, self.blocks.block_size
        budget = self.limits.max_num_batched_tokens
        scheduled: dict[Sequence, int] = {}
        self.media.begin()
        todo = [(s, s.length - s.num_computed) for s in self.running if not s.ends_with_pending]
        todo.sort(key=lambda item: item[1] > 1)  # decodes first
        for sequence, missing in todo:
            count = sequence.in_one_row(sequence.num_computed, min(missing, budget))
            if count == 0 or sequence not in self.running:
                continue  # no budget, or preempted by one before it
            if sequence.items:
                count = self.media.count(sequence, sequence.num_computed, count)
                if count == 0:
                    continue  # its media are encoded in a later step
            budget -= count
            scheduled[sequence] = count
            if sequence.num_computed + count > len(sequence.blocks) * size:
                budget += self._grow(sequence, count, scheduled)
        room = self._places.room()
        if self.preemptions == preemptions:
            self._admit_waiting(scheduled, budget, now, room)
        for sequence in self.waiting[:PREFETCHED]:
            self._hold_places(sequence, now, room)
        see_whole = self.limits.see_whole
        rows = [make_row(s, count, see_whole=see_whole) for s, count in scheduled.items()]
        rows.sort(key=_by_members)
        return StepPlan(tuple(rows), *self.media.finish(rows), _pooled(scheduled))

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
        self.blocks.check_integrity()
        if self.adapters is not None:
            self.adapters.check_integrity()

    # --- running -------------------------------------------------------------------------------

    def _grow(self, sequence: Sequence, count: int, scheduled: dict[Sequence, int]) -> int:
        """Get blocks for `count` more positions, preempting the youngest running ones if needed.

        Returns the tokens that the preempted ones (`sequence` itself, in the end) leave unused.
        """
        missing = self.blocks.blocks_for(sequence.num_computed + count) - len(sequence.blocks)
        unused = 0
        while missing > 0 and sequence in scheduled:
            if (taken := self.blocks.take(missing)) is not None:
                sequence.set_blocks(sequence.blocks + taken)
                break
            victim = next(reversed(self.running))
            unused += scheduled.pop(victim, 0)
            self._preempt(victim, victim.queued_at)
        return unused

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

    def _admit_waiting(
        self, scheduled: dict[Sequence, int], budget: int, now: float, room: Room
    ) -> None:
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.limits.max_num_seqs:
                break
            if sequence.elder is not None and not sequence.elder.prompt_can_be_shared:
                continue  # its prompt is being computed by the first answer of the request
            if not self._hold_places(sequence, now, room):
                continue
            if sequence.num_pending:
                continue  # preempted a moment ago; all its tokens will be known in the next step
            count = self._start(sequence, budget, now)
            if count == 0:
                break  # no blocks: those behind must not overtake
            scheduled[sequence] = count
            budget -= count

    def _start(self, sequence: Sequence, budget: int, now: float) -> int:
        """Give a waiting sequence its cached prefix and blocks; tokens it may compute, 0 if none."""
        prefix = sequence.cached_prefix(self.blocks)
        cached = len(prefix) * self.blocks.block_size
        members = self._places.members(sequence)
        count = sequence.in_one_row(cached, min(sequence.num_tokens - cached, budget))
        if sequence.items:
            count = self.media.count(sequence, cached, count, members)
            if count == 0:
                return 0
        need = self.blocks.blocks_for(cached + count) - len(prefix)
        if need > self.blocks.num_free_beside(prefix):
            return 0
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
        sequence.admitted_at = now
        self.waiting.remove(sequence)
        self.running[sequence] = None
        return count

    def _hold_places(self, sequence: Sequence, now: float, room: Room) -> bool:
        """Whether every adapter of `sequence` is resident; asks for those that are not."""
        if not sequence.digests:
            return True
        if not sequence.held:
            if not room.fits(sequence):
                room.closed = room.closed or self._is_impatient(sequence, now)
                return False
            self._places.hold(sequence, now)
            room.held.update(sequence.digests)
        return self._places.are_resident(sequence)

    # --- rotation ------------------------------------------------------------------------------

    def _is_impatient(self, sequence: Sequence, now: float) -> bool:
        return now - sequence.queued_at >= self.limits.adapter_patience_s

    def _rotate_for_the_impatient(self, now: float) -> None:
        """Give places to the oldest sequence that has waited too long for its adapters, if any.

        Before anything is scheduled, since those that give way must not be in the step.
        """
        if self.adapters is None:
            return
        room = self._places.room()
        for index, sequence in enumerate(self.waiting):
            if not self._is_impatient(sequence, now):
                return  # and all behind it are younger
            if sequence.held or room.fits(sequence):
                continue
            self._rotate(sequence, self.waiting[:index], self.waiting[index + 1 :], now)
            if self.adapters.can_hold(sequence.digests):
                self._places.hold(sequence, now)
            return

    def _rotate(
        self, sequence: Sequence, older: list[Sequence], younger: list[Sequence], now: float
    ) -> None:
        """Take places until `sequence` fits: from younger ones that wait, then from those held longest.

        None of the latter goes before it had `adapter_patience_s` itself, nor before each of its
        sequences has got a token further, nor while only older ones wait for it: else two of them
        could push each other out for ever.
        """
        pool = self.adapters
        assert pool is not None
        for other in reversed(younger):
            if other.held:
                self._places.release(other)
                if pool.can_hold(sequence.digests):
                    return
        stuck = {d for s in older for d in s.held} - {d for s in self.running for d in s.held}
        stuck |= {d for s in self.running if not s.has_advanced for d in s.held}
        stuck.update(sequence.digests, pool.pins)
        for digest in self._places.held_before(now - self.limits.adapter_patience_s):
            if pool.can_hold(sequence.digests):
                return
            holders = [s for s in self.running if digest in s.held]
            if digest in stuck or not all(self._gives_way(s, sequence, now) for s in holders):
                continue
            for other in holders:
                self._preempt(other, now)
            for other in older:
                if digest in other.held:
                    self._places.release(other)

    def _gives_way(self, running: Sequence, waiting: Sequence, now: float) -> bool:
        """Whether one that runs may be put back for one that waits: it came later, or had its turn.

        What is put back is computed again. So that this takes a small part of the time only, turns
        are the longer, the more sequences would be put back in each."""
        if running.queued_at > waiting.queued_at:
            return True
        turn = max(1.0, len(self.running) / FEW) * self.limits.adapter_patience_s
        return now - running.admitted_at >= turn


def _pooled(scheduled: dict[Sequence, int]) -> tuple[int, ...]:
    """Those that end with the tokens they have been given."""
    ending = (s for s, n in scheduled.items() if s.pools and s.num_computed + n == s.length)
    return tuple(sequence.sequence_id for sequence in ending)


def _by_members(row: Row) -> tuple[tuple[tuple[int, float], ...], int]:
    return row.members, row.sequence_id


def make_scheduler(
    config: EngineConfig, num_blocks: int, encoder: EncoderFacts | None = None
) -> Scheduler:
    """The scheduler of a resolved config."""
    assert config.max_num_batched_tokens is not None
    limits = SchedulerLimits(
        *(config.max_num_seqs, config.max_num_batched_tokens, config.adapter_patience_s),
        see_whole=encoder is not None and encoder.sees_whole,
    )
    blocks = BlockPool(
        num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
    )
    lora = config.lora
    granule = config.row_granule
    pool = None
    if lora is not None:
        rows = 1 << affine_shift(lora, granule)
        pool = AdapterPool(lora.max_loras, lora.max_lora_rank, granule, affine_rows=rows)
    room = config.encoder_cache_tokens
    cache = EncoderCache(room, limits.max_num_batched_tokens) if room else None
    return Scheduler(limits, blocks, pool, cache)
