"""Which tokens run in the next step. Integers and dictionaries only; no torch.

    waiting --hold places, get blocks--> running --stop, length, cancel--> gone
       ^------------- preempted (blocks or places given back) --|

A sequence runs when it has blocks *and* its adapters are resident. Running decodes come first, then
running prefills, then the queue in order of age. A waiting sequence whose adapters find no place is
passed by those behind it, but not for ever: after `adapter_patience_s` the adapters that were held
longest give way to it, and their sequences go back to the queue (their blocks stay in the prefix
cache, so little is computed twice).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from loramux.adapters.pool import AdapterPool
from loramux.engine.blocks import BlockPool
from loramux.engine.plan import AdapterLoad, Row, Sampled, SampleSpec, StepPlan, StepResult
from loramux.engine.sequence import Sequence
from loramux.types import FinishReason


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step; `adapter_patience_s` in seconds of the clock that `plan` is given."""

    max_num_seqs: int
    max_num_batched_tokens: int
    adapter_patience_s: float


class Scheduler:
    """Decides; owns the queue, the block pool and the adapter places."""

    def __init__(self, limits: SchedulerLimits, blocks: BlockPool, adapters: AdapterPool | None):
        self.limits = limits
        self.blocks = blocks
        self.adapters = adapters
        self.waiting: list[Sequence] = []  # sorted by queued_at
        self.running: list[Sequence] = []  # in order of admission
        self.preemptions = 0
        self._loads: list[AdapterLoad] = []
        self._held_since: dict[str, float] = {}

    # --- the queue -----------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.queued_at)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Take `sequence` out, wherever it is, and give back what it had."""
        sequence.finish_reason = reason
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._give_back(sequence)

    def take_loads(self) -> list[AdapterLoad]:
        """Adapters to bring to the device, decided since the last call."""
        loads, self._loads = self._loads, []
        return loads

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
        self._rotate_for_the_impatient(now)
        budget = self.limits.max_num_batched_tokens
        scheduled: dict[Sequence, int] = {}
        preemptions = self.preemptions
        for sequence in sorted(self.running, key=lambda s: s.num_tokens - s.num_computed > 1):
            if self.preemptions != preemptions and sequence not in self.running:
                continue  # preempted by one before it
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            if count:
                budget -= count
                scheduled[sequence] = count
                budget += self._grow(sequence, count, scheduled)
        if self.preemptions == preemptions:
            self._admit_waiting(scheduled, budget, now)
        rows = [self._row(sequence, count) for sequence, count in scheduled.items()]
        return StepPlan(tuple(sorted(rows, key=lambda row: (row.members, row.sequence_id))))

    def commit(self, plan: StepPlan, result: StepResult) -> list[tuple[Sequence, Sampled]]:
        """Book what was computed. Returns each sequence that chose a token, with the token."""
        by_id = {sequence.sequence_id: sequence for sequence in self.running}
        advanced = []
        for row in plan.rows:
            sequence = by_id.get(row.sequence_id)
            if sequence is None:
                continue  # cancelled while the step ran
            before = sequence.num_computed // self.blocks.block_size
            sequence.num_computed += len(row.token_ids)
            self._remember(sequence, before)
            if (sampled := result.sampled.get(row.sequence_id)) is not None:
                sequence.tokens.append(sampled.token_id)
                advanced.append((sequence, sampled))
        return advanced

    def check_integrity(self) -> None:
        """With nothing queued, every block and place must be back."""
        assert not self.has_work, "check_integrity needs an idle scheduler"
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
                sequence.blocks += taken
                break
            victim = self.running[-1]
            unused += scheduled.pop(victim, 0)
            self._preempt(victim, victim.queued_at)
        return unused

    def _preempt(self, sequence: Sequence, queued_at: float) -> None:
        """Put a running sequence back into the queue; it will be computed again from the cache."""
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.num_computed = 0
        sequence.queued_at = queued_at
        self.preemptions += 1
        self.add(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        sequence.blocks = []
        self._release_places(sequence)

    # --- admission -----------------------------------------------------------------------------

    def _admit_waiting(self, scheduled: dict[Sequence, int], budget: int, now: float) -> None:
        no_place: set[tuple[str, ...]] = set()  # compositions already found without a place
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.limits.max_num_seqs:
                break
            if sequence.elder is not None and not sequence.elder.prompt_is_computed:
                continue  # its prompt is being computed by the first answer of the request
            if not self._hold_places(sequence, now, no_place):
                continue
            count = self._start(sequence, budget)
            if count == 0:
                break  # no blocks: those behind must not overtake
            scheduled[sequence] = count
            budget -= count

    def _start(self, sequence: Sequence, budget: int) -> int:
        """Give a waiting sequence its cached prefix and blocks; tokens it may compute, 0 if none."""
        prefix = sequence.cached_prefix(self.blocks)
        cached = len(prefix) * self.blocks.block_size
        count = min(sequence.num_tokens - cached, budget)
        need = self.blocks.blocks_for(cached + count) - len(prefix)
        if need > self.blocks.num_free_beside(prefix):
            return 0
        self.blocks.share(prefix)
        fresh = self.blocks.take(need)
        assert fresh is not None, "counted blocks are missing. This is a bug."
        sequence.blocks = prefix + fresh
        sequence.num_computed = cached
        if not sequence.admitted_once:
            sequence.admitted_once = True
            sequence.num_cached = cached
            self.blocks.queries += sequence.num_prompt
            self.blocks.hits += cached
        sequence.num_output_at_admission = sequence.num_output
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return count

    # --- places --------------------------------------------------------------------------------

    def _hold_places(self, sequence: Sequence, now: float, no_place: set[tuple[str, ...]]) -> bool:
        """Whether every adapter of `sequence` is resident; asks for those that are not."""
        digests = sequence.digests
        if not digests:
            return True
        pool = self.adapters
        assert pool is not None, "an adapter request without an adapter pool. This is a bug."
        if not sequence.held:
            key = tuple(digests)
            if key in no_place:
                return False
            if not pool.can_hold(digests):
                no_place.add(key)
                return False
            self._hold(sequence, now)
        return all(pool.is_resident(digest) for digest in digests)

    def _hold(self, sequence: Sequence, now: float) -> None:
        """Hold every adapter of `sequence`, asking for those that are not on the device."""
        assert self.adapters is not None
        for digest in sequence.digests:
            ref = sequence.refs[digest]
            self._held_since.setdefault(digest, now)
            if (first_row := self.adapters.hold(digest, ref.max_r)) is not None:
                self._loads.append(AdapterLoad(ref, first_row))
        sequence.held = sequence.digests

    def _release_places(self, sequence: Sequence) -> None:
        for digest in sequence.held:
            assert self.adapters is not None
            self.adapters.release(digest)
        released, sequence.held = sequence.held, []
        for digest in released:
            assert self.adapters is not None
            if not self.adapters.has_holder(digest):
                self._held_since.pop(digest, None)

    def _rotate_for_the_impatient(self, now: float) -> None:
        """Give places to the oldest sequence that has waited too long for its adapters, if any.

        Before anything is scheduled, since those that give way must not be in the step.
        """
        if self.adapters is None:
            return
        for sequence in self.waiting:
            if now - sequence.queued_at < self.limits.adapter_patience_s:
                return  # and all behind it are younger
            if sequence.held or self.adapters.can_hold(sequence.digests):
                continue
            self._rotate(sequence, now)
            if self.adapters.can_hold(sequence.digests):
                self._hold(sequence, now)
            return

    def _rotate(self, sequence: Sequence, now: float) -> None:
        """Take places from the adapters that were held longest until `sequence` fits.

        None goes before it had `adapter_patience_s` itself, nor before each of its sequences has
        got a token further: else two of them could push each other out for ever.
        """
        pool, patience = self.adapters, self.limits.adapter_patience_s
        assert pool is not None
        stuck = {d for s in self.waiting for d in s.held}
        stuck |= {d for s in self.running if not s.has_advanced for d in s.held}
        turns = sorted(
            (since, digest)
            for digest, since in self._held_since.items()
            if digest not in stuck and digest not in sequence.digests and now - since >= patience
        )
        for _, digest in turns:
            if pool.can_hold(sequence.digests):
                return
            for other in [s for s in self.running if digest in s.held]:
                self._preempt(other, now)

    # --- rows ----------------------------------------------------------------------------------

    def _row(self, sequence: Sequence, count: int) -> Row:
        start = sequence.num_computed
        last = start + count == sequence.num_tokens
        members: tuple[tuple[int, float], ...] = ()
        if sequence.held:
            assert self.adapters is not None
            members = tuple((self.adapters.row_of(d), scale) for d, scale in sequence.composition)
        return Row(
            sequence_id=sequence.sequence_id,
            token_ids=tuple(sequence.tokens[start : start + count]),
            start=start,
            block_table=tuple(sequence.blocks),
            members=members,
            sample=_sample_spec(sequence) if last else None,
        )

    def _remember(self, sequence: Sequence, first_block: int) -> None:
        """Publish the blocks that this step filled."""
        if not self.blocks.enable_prefix_caching:
            return
        sequence.update_keys(self.blocks.block_size)
        for index in range(first_block, sequence.num_computed // self.blocks.block_size):
            self.blocks.remember(sequence.blocks[index], sequence.keys[index])


def _sample_spec(sequence: Sequence) -> SampleSpec:
    params = sequence.request.params
    penalised = (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )
    stop_ids = sequence.stop_ids if sequence.num_output < params.min_tokens else ()
    return SampleSpec(
        params=params,
        seed=sequence.seed,
        position=sequence.num_output,
        stop_ids=stop_ids,
        prompt_ids=tuple(sequence.tokens[: sequence.num_prompt]) if penalised else (),
        output_ids=tuple(sequence.output_ids) if penalised else (),
    )
