"""Who sits where on the device: rank rows in integers, no tensors.

    slot 0                      slot 1                      (max_loras slots of max_lora_rank rows)
    |aaaaaaaa|bbbb|....|        |cccccccccccccccc|          a: r 8, b: r 4, c: r 16

An adapter of rank r takes r neighbouring rows of one slot, so small ones share a slot and none is
padded. Because an adapter never spans slots, at most `max_loras - 1` held adapters leave one slot
without a holder, whose idle tenants can go: one more always fits, whatever came before.

A *holder* is a request that needs the adapter where it is. Held adapters are never evicted; idle
ones go least recently used first. A *pinned* adapter counts as held from the moment it has a place,
and until then no request may take the place it needs.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(slots=True)
class _Tenant:
    first_row: int
    r: int
    slot: int
    state: Literal["loading", "resident"] = "loading"
    holders: int = 0
    doomed: bool = False  # removed while its weights were still being written


class AdapterPool:
    """Places of adapters in the rank-row pool."""

    def __init__(
        self, max_loras: int, max_lora_rank: int, granule: int = 1, *, affine_rows: int = 1
    ):
        """Adapters begin at multiples of `granule` and take multiples of it. `affine_rows` share a place
        for gains and shifts, see `affine_r`."""
        self.max_loras = max_loras
        self._granule = granule
        self._whole = math.lcm(granule, affine_rows)
        self.rows_per_slot = self._rows(max_lora_rank)
        self.evictions = 0
        self.on_evict: Callable[[str], None] = lambda digest: None
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()  # least recently used first
        self._pins: dict[str, int] = {}  # digest -> r
        self._placed_pins: set[str] = set()  # those that count as held

    def affine_r(self, r: int) -> int:
        """For what rank an adapter of rank r with gains and shifts is held: it shares its places with
        nobody, so it takes whole ones, and every adapter of such a rank begins at one."""
        return r + -r % self._whole

    @property
    def num_rows(self) -> int:
        return self.max_loras * self.rows_per_slot

    def row_of(self, digest: str) -> int:
        """First row of a resident adapter."""
        tenant = self._tenants[digest]
        assert tenant.state == "resident", "asked for an adapter that is not there. This is a bug."
        return tenant.first_row

    def is_resident(self, digest: str) -> bool:
        tenant = self._tenants.get(digest)
        return tenant is not None and tenant.state == "resident"

    def has_holder(self, digest: str) -> bool:
        tenant = self._tenants.get(digest)
        return tenant is not None and tenant.holders > 0

    def held(self) -> set[str]:
        """Digests that cannot go now: some request holds them, their weights are on the way, or
        they are pinned and have a place."""
        return {d for d, t in self._tenants.items() if self._stays(d, t)}

    @property
    def pins(self) -> frozenset[str]:
        """Digests that are pinned, those too that have no place yet."""
        return frozenset(self._pins)

    def can_hold(self, digests: Iterable[str]) -> bool:
        """Whether these fit beside everything held now and all pins, at most `max_loras` in all."""
        held, wanted = self.held(), set(digests)
        return wanted <= held or len(held.union(wanted, self._pins)) <= self.max_loras

    def set_pins(self, pins: Mapping[str, int]) -> None:
        """Pin exactly these, digest -> r. Fewer than `max_loras`."""
        assert len(pins) < self.max_loras or not pins, "pins leave no place. This is a bug."
        self._pins = dict(pins)
        self._placed_pins.intersection_update(pins)

    def place_pins(self) -> list[tuple[str, int]]:
        """Give pins without a place one, as far as others leave room. (digest, first row) of those
        whose weights must be loaded."""
        loads = []
        for digest, r in self._pins.items():
            if digest in self._placed_pins or len(self.held() | {digest}) > self.max_loras:
                continue
            if digest not in self._tenants:
                loads.append((digest, self._settle(digest, r)))
            self._tenants[digest].doomed = False
            self._placed_pins.add(digest)
        return loads

    def hold(self, digest: str, r: int) -> int | None:
        """Add a holder. Returns the first row to load into if the adapter was absent, else None.

        The caller has asked `can_hold`; then there is always room.
        """
        tenant = self._tenants.get(digest)
        if tenant is not None:
            self._tenants.move_to_end(digest)
            tenant.holders += 1
            tenant.doomed = False
            return None
        first_row = self._settle(digest, r)
        self._tenants[digest].holders = 1
        return first_row

    def release(self, digest: str) -> None:
        tenant = self._tenants[digest]
        tenant.holders -= 1
        assert tenant.holders >= 0, "released more often than held. This is a bug."

    def loaded(self, digest: str) -> None:
        """The weights are in their rows."""
        tenant = self._tenants[digest]
        tenant.state = "resident"
        if tenant.doomed and not tenant.holders:
            del self._tenants[digest]

    def load_failed(self, digest: str) -> None:
        """The weights did not arrive; its holders must have been released. Its pin is gone too."""
        assert not self._tenants[digest].holders, "a failed adapter is still held. This is a bug."
        del self._tenants[digest]
        self._pins.pop(digest, None)
        self._placed_pins.discard(digest)

    def drop(self, digest: str) -> None:
        """The version is gone for good: free its rows as soon as nobody writes them."""
        tenant = self._tenants.get(digest)
        if tenant is None or tenant.holders or digest in self._placed_pins:
            return
        if tenant.state == "loading":
            tenant.doomed = True
        else:
            del self._tenants[digest]

    def resident(self) -> list[str]:
        return [d for d, tenant in self._tenants.items() if tenant.state == "resident"]

    def __contains__(self, digest: str) -> bool:
        """Whether rows are taken for it."""
        return digest in self._tenants

    @property
    def rows_taken(self) -> int:
        return sum(tenant.r for tenant in list(self._tenants.values()))

    def check_integrity(self) -> None:
        """No holder is left, and no two adapters share a row."""
        assert not any(t.holders for t in self._tenants.values()), "adapter holders leaked"
        rows = [
            row for t in self._tenants.values() for row in range(t.first_row, t.first_row + t.r)
        ]
        assert len(rows) == len(set(rows)), "two adapters share a row"

    def _rows(self, r: int) -> int:
        return r + -r % self._granule

    def _stays(self, digest: str, tenant: _Tenant) -> bool:
        return bool(tenant.holders) or tenant.state == "loading" or digest in self._placed_pins

    def _settle(self, digest: str, r: int) -> int:
        """Make it a tenant, and return its first row."""
        rows = self._rows(r)
        slot, first_row = self._find(rows)
        self._tenants[digest] = _Tenant(first_row, rows, slot)
        return first_row

    def _find(self, r: int) -> tuple[int, int]:
        """(slot, first row) with r free rows, evicting idle adapters if it must."""
        assert r <= self.rows_per_slot, "an adapter larger than max_lora_rank came this far"
        for slot in range(self.max_loras):
            if (row := self._gap(slot, r)) is not None:
                return slot, row
        while True:
            slot = self._evict_one()
            if (row := self._gap(slot, r)) is not None:
                return slot, row

    def _gap(self, slot: int, r: int) -> int | None:
        """First row of r free neighbours in `slot`, or None."""
        start = slot * self.rows_per_slot
        end = start + self.rows_per_slot
        taken = sorted((t.first_row, t.r) for t in self._tenants.values() if t.slot == slot)
        step = self._whole if r % self._whole == 0 else 1
        row = start
        for first, count in [*taken, (end, 0)]:
            row += -row % step
            if first - row >= r:
                return row
            row = first + count
        return None

    def _evict_one(self) -> int:
        """Evict the least recently used idle adapter, from a slot nobody holds where there is one."""
        blocked = {t.slot for d, t in self._tenants.items() if self._stays(d, t)}
        idle = [d for d, t in self._tenants.items() if not self._stays(d, t)]
        free = [d for d in idle if self._tenants[d].slot not in blocked]
        assert free or idle, "no adapter can be evicted: can_hold was not asked. This is a bug."
        digest = (free or idle)[0]
        self.evictions += 1
        self.on_evict(digest)
        return self._tenants.pop(digest).slot
