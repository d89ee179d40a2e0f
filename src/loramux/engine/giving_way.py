"""Who is put back when seats or blocks are full and a tenant has less than its share. Torch-free.

A tenant's share of the seats (`max_num_seqs`) and of the blocks goes by the weights of the tenants that
are there. Only one that stays within its share takes, and only from those above theirs that were served
more, so nothing swings and tokens decide in the end. A sequence is put back for another tenant once at
any time; then only after a turn, whose length goes with what has to be computed again. So it has got
further each time, and as its tokens are bounded, this ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loramux.engine.fair_share import FairShare, Tenant
from loramux.engine.sequence import Sequence

LEAST_TURN = 8  # tokens
TURN_PART = 16  # a turn is a token for so many that may have to be computed again


def had_turn(sequence: Sequence) -> bool:
    """Whether it may be put back for another tenant."""
    if sequence.given_way == 0:
        return True
    won = sequence.num_output + sequence.num_pending - sequence.num_output_at_admission
    return won >= max(LEAST_TURN, sequence.num_tokens // TURN_PART)


def may_take_seat(fair: FairShare, sequence: Sequence, seats: int) -> bool:
    """Whether all its tenants have fewer than their share of `seats`."""
    return all(t.running < fair.seats(t, seats) for t in _tenants_of(sequence))


def gives_seat(
    fair: FairShare, running: dict[Sequence, None], seats: int, behind: float, now: float
) -> Sequence | None:
    """The youngest sequence of the tenant that has the most seats above its share, if any may go of
    those whose virtual time is later than `behind`."""
    used = {tenant: float(tenant.running) for tenant in _tenants(running)}
    above = {tenant for tenant in used if tenant.running > fair.seats(tenant, seats)}
    return _youngest_of_most(running, used, above, now, behind)


def may_take_blocks(
    fair: FairShare, sequence: Sequence, running: dict[Sequence, None], need: int, blocks: int
) -> bool:
    """Whether all its tenants stay within their share of `blocks` with `need` more."""
    used = _blocks_used(running)
    return all(used.get(t, 0.0) + need <= fair.share(t, blocks) for t in _tenants_of(sequence))


def gives_blocks(
    fair: FairShare, running: dict[Sequence, None], blocks: int, behind: float, now: float
) -> Sequence | None:
    """The youngest sequence of the tenant that has the most blocks above its share, if any may go of
    those whose virtual time is later than `behind`."""
    used = _blocks_used(running)
    above = {tenant for tenant, count in used.items() if count > fair.share(tenant, blocks)}
    return _youngest_of_most(running, used, above, now, behind)


def _youngest_of_most(
    running: dict[Sequence, None],
    used: Mapping[Tenant, float],
    above: set[Tenant],
    now: float,
    behind: float,
) -> Sequence | None:
    """Of those all of whose tenants are `above`. What was admitted in this step stays."""
    if not above:
        return None
    found, most = None, 0.0
    for sequence in reversed(running):
        tenants = _tenants_of(sequence)
        if not all(t in above and t.virtual > behind for t in tenants):
            continue
        weighed = min(used[tenant] / tenant.weight for tenant in tenants)
        if weighed > most and sequence.admitted_at < now and had_turn(sequence):
            found, most = sequence, weighed
    return found


def _blocks_used(running: Iterable[Sequence]) -> dict[Tenant, float]:
    used: dict[Tenant, float] = {}
    for sequence in running:
        for tenant in _tenants_of(sequence):
            used[tenant] = used.get(tenant, 0.0) + len(sequence.blocks)
    return used


def _tenants(running: Iterable[Sequence]) -> set[Tenant]:
    return {tenant for sequence in running for tenant in _tenants_of(sequence)}


def _tenants_of(sequence: Sequence) -> tuple[Tenant, ...]:
    assert sequence.group is not None
    return sequence.group.tenants
