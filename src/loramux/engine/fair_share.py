"""Whose turn it is: weighted fair sharing of tokens between tenants. Torch-free.

A *tenant* is an adapter by its name, whatever version is served, or the base model (""). The tenants
of a request are those of its composition; all of them are charged, and the one that was served most
counts. Requests with the same tenants are a *group*, within which the oldest is first.

Each tenant has a virtual time: the tokens computed for it, over its weight. The group whose virtual
time is least has the next turn. A tenant that comes back takes the least virtual time of those that are
there, unless its own is later: an idle one saves nothing up. These are start-time fair queueing (Goyal,
Vin and Cheng, SIGCOMM 1996) and its form for language models, the virtual token counter (Sheng and
others, "Fairness in Serving Large Language Models", OSDI 2024). With one tenant all is first come, first
served.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from loramux.config.limits import BASE_TENANT
from loramux.engine.sequence import Sequence
from loramux.status import TenantStatus

MOST_IDLE = 4096  # tenants that are remembered though nothing of theirs is in flight

_Entry = tuple[float, bool, float, int, "Group"]  # virtual time, waits, queued at, number


@dataclass(slots=True, eq=False)
class Tenant:
    """`weight` is its share in relation to others', `virtual` its virtual time in tokens."""

    name: str
    weight: float
    virtual: float = 0.0
    tokens: int = 0  # computed for it since the start; those of a shared prefix but once
    open: int = 0  # sequences that have not ended
    waiting: int = 0  # of these, those in the queue

    @property
    def running(self) -> int:
        return self.open - self.waiting


@dataclass(slots=True, eq=False)
class Group:
    """Sequences that have the same tenants; `waiting` are those in the queue, the oldest first."""

    tenants: tuple[Tenant, ...]
    waiting: list[Sequence] = field(default_factory=list)
    open: int = 0
    listed: bool = False  # whether the heap has it

    @property
    def virtual(self) -> float:
        tenants = self.tenants
        return tenants[0].virtual if len(tenants) == 1 else max(t.virtual for t in tenants)

    @property
    def weight(self) -> float:
        return min(tenant.weight for tenant in self.tenants)


class FairShare:
    """The tenants with sequences in flight, and what each was served."""

    def __init__(self, weight_of: Callable[[str], float] = lambda name: 1.0):
        self._weight_of = weight_of
        self._tenants: dict[str, Tenant] = {}
        self._active: dict[Tenant, None] = {}  # values unused
        self._groups: dict[tuple[str, ...], Group] = {}
        self._heap: list[_Entry] = []  # groups that wait; virtual times may have risen since
        self._late: list[Group] | None = None  # during a walk: those that wait since it began
        self._numbers = itertools.count()
        self._level = 0.0  # virtual time at which the last one left
        self._weight = 0.0  # of all that are active

    # --- who is there --------------------------------------------------------------------------

    @property
    def is_shared(self) -> bool:
        """Whether several tenants have something in flight."""
        return len(self._active) > 1

    def enter(self, sequence: Sequence) -> None:
        """A new sequence: it belongs to a group from now on."""
        names = sequence.request.tenants or (BASE_TENANT,)
        group = self._groups.get(names)
        if group is None:
            if len(self._tenants) >= MOST_IDLE + len(self._active):
                self._tenants = {tenant.name: tenant for tenant in self._active}
            group = self._groups[names] = Group(tuple(map(self._tenant, names)))
        sequence.group = group
        group.open += 1
        for tenant in group.tenants:
            if tenant.open == 0:
                self._activate(tenant)
            tenant.open += 1

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended, and is not in the queue."""
        group = _group_of(sequence)
        group.open -= 1
        for tenant in group.tenants:
            tenant.open -= 1
            if tenant.open == 0:
                self._deactivate(tenant)
        if group.open == 0:
            del self._groups[tuple(tenant.name for tenant in group.tenants)]

    def queue(self, sequence: Sequence) -> None:
        group = _group_of(sequence)
        bisect.insort(group.waiting, sequence, key=lambda s: s.queued_at)
        for tenant in group.tenants:
            tenant.waiting += 1
        self._list(group)

    def unqueue(self, sequence: Sequence) -> None:
        group = _group_of(sequence)
        group.waiting.remove(sequence)
        for tenant in group.tenants:
            tenant.waiting -= 1

    def _tenant(self, name: str) -> Tenant:
        if (tenant := self._tenants.get(name)) is None:
            tenant = self._tenants[name] = Tenant(name, self._weight_of(name))
        return tenant

    def _activate(self, tenant: Tenant) -> None:
        least = min((t.virtual for t in self._active), default=self._level)
        tenant.virtual = max(tenant.virtual, least)
        self._active[tenant] = None
        self._weight += tenant.weight

    def _deactivate(self, tenant: Tenant) -> None:
        del self._active[tenant]
        self._weight -= tenant.weight
        if not self._active:
            self._level, self._weight = max(self._level, tenant.virtual), 0.0

    # --- what each one gets --------------------------------------------------------------------

    def charge(self, sequence: Sequence, end: int) -> None:
        """Tokens up to `end` are computed for `sequence`. What was charged once is not charged again,
        should a preempted sequence be computed anew."""
        count = end - sequence.charged
        if count > 0:
            sequence.charged = end
            for tenant in sequence.group.tenants:  # type: ignore[union-attr]  # for speed
                tenant.tokens += count
                tenant.virtual += count / tenant.weight

    def share(self, tenant: Tenant, total: int) -> float:
        """Its part of `total` seats or blocks, by the weights of those that are there."""
        return total * tenant.weight / self._weight

    def seats(self, tenant: Tenant, total: int) -> int:
        """Its part of `total` seats, one at least."""
        return max(1, int(self.share(tenant, total)))

    def turns(self, prefills: Iterable[Sequence]) -> Turns:
        """One walk over `prefills`, which run, and all that wait, each group when it is its turn."""
        return Turns(self, prefills)

    def standing(self) -> list[TenantStatus]:
        """What each tenant has in flight and was served; any thread may ask."""
        return [
            TenantStatus(t.name, max(0, t.running), t.waiting, t.tokens)
            for t in list(self._tenants.values())
        ]

    def check_integrity(self) -> None:
        """With nothing in flight, nobody is there."""
        assert not self._active and not self._groups, "a tenant has not left"
        assert not any(t.open or t.waiting for t in self._tenants.values()), "a count is off"

    def _list(self, group: Group) -> None:
        if self._late is not None:
            self._late.append(group)
        elif not group.listed and group.waiting:
            group.listed = True
            entry = (group.virtual, True, group.waiting[0].queued_at, next(self._numbers), group)
            heapq.heappush(self._heap, entry)


class Turns:
    """The sequences of one step in order of their turns, as they stand when the next is asked for.

    Of a group, those that run come first; what is put back meanwhile does not come. Use it as a context:
    at its end, groups that still wait are listed again."""

    def __init__(self, fair: FairShare, prefills: Iterable[Sequence]):
        self._fair = fair
        self._here: list[_Entry] = []  # groups that were met
        self._running: dict[Group, list[Sequence]] = {}  # the next one last
        self._waiting: dict[Group, tuple[list[Sequence], int]] = {}
        self._last: Group | None = None
        self.closed = False
        """No more waiting sequences come."""
        self.waits = False
        """Whether the one that came last waits; else it ran when the walk began."""
        for sequence in prefills:
            self._running.setdefault(_group_of(sequence), []).append(sequence)
        for group, sequences in self._running.items():
            sequences.reverse()
            self._push(group, waits=False)

    def __enter__(self) -> Turns:
        self._fair._late = []
        return self

    def __exit__(self, *_: object) -> None:
        late, self._fair._late = self._fair._late or [], None
        for group in (*self._waiting, *late):
            self._fair._list(group)

    def __iter__(self) -> Iterator[Sequence]:
        return self

    def __next__(self) -> Sequence:
        if (last := self._last) is not None:  # it has been charged meanwhile
            self._last = None
            self._push(last, waits=True)
        while (entry := self._pop()) is not None:
            virtual, waits, _, _, group = entry
            if group.virtual > virtual:
                self._push(group, waits=waits)
            elif not waits:
                self.waits = False
                sequence = self._running[group].pop()
                self._push(group, waits=False)
                return sequence
            elif not self.closed:
                sequences, position = self._waiting[group]
                self._waiting[group] = sequences, position + 1
                self._last, self.waits = group, True
                return sequences[position]
        raise StopIteration

    @property
    def num_met(self) -> int:
        """Groups of which a waiting sequence came."""
        return len(self._waiting)

    def skip_group(self) -> None:
        """No more of those that wait in the last one's group."""
        self._last = None

    def skip_like(self, sequence: Sequence) -> None:
        """`sequence` came last and finds no place: those behind it with the same adapters do not
        come."""
        group = _group_of(sequence)
        sequences, position = self._waiting[group]
        while position < len(sequences) and sequences[position].digests == sequence.digests:
            position += 1
        self._waiting[group] = sequences, position

    def kept_for_others(self, sequence: Sequence, budget: int) -> int:
        """Tokens that a prompt longer than `budget` leaves to the next ones of other groups, so that
        they need not wait for its next part: of each that fits its group's share of the budget."""
        own = _group_of(sequence)
        heads: dict[Group, Sequence] = {}
        for _, waits, _, _, group in itertools.chain(self._fair._heap, self._here):
            if group is not own and (head := self._head(group, waits)) is not None:
                heads[group] = head
        weight = own.weight + sum(group.weight for group in heads)
        kept = 0
        for group, head in heads.items():
            missing = head.length - head.num_computed
            if missing <= budget * group.weight / weight:
                kept += missing
        return kept

    def _head(self, group: Group, waits: bool) -> Sequence | None:
        """The next one of a group, if it can run as far as is known."""
        if not waits:
            return self._running[group][-1]
        if self.closed:
            return None
        sequences, position = self._waiting.get(group, (group.waiting, 0))
        if position >= len(sequences):
            return None
        head = sequences[position]
        return head if head.held or not head.digests else None

    def _push(self, group: Group, *, waits: bool) -> None:
        """List a group again, if there is anything of it."""
        if waits:
            sequences, position = self._waiting[group]
            if position >= len(sequences):
                return
            queued_at = sequences[position].queued_at
        else:
            if not (running := self._running[group]):
                return
            queued_at = running[-1].queued_at
        entry = (group.virtual, waits, queued_at, next(self._fair._numbers), group)
        heapq.heappush(self._here, entry)

    def _pop(self) -> _Entry | None:
        heap, here = self._fair._heap, self._here
        while heap and not self.closed and (not here or heap[0] < here[0]):
            entry = heapq.heappop(heap)
            group = entry[-1]
            group.listed = False
            if not group.waiting:
                continue
            self._waiting[group] = list(group.waiting), 0
            return entry
        return heapq.heappop(here) if here else None


def _group_of(sequence: Sequence) -> Group:
    assert sequence.group is not None, "a sequence that never entered. This is a bug."
    return sequence.group


def virtual_time(sequence: Sequence) -> float:
    """That of its tenant, or of the one that was served most."""
    return _group_of(sequence).virtual
