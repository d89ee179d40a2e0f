"""Names, versions and users of adapters. Torch-free; safe to call from any thread.

    name --current--> version (one digest) --name moved on or removed--> drains --last user--> gone

A name points at one version at a time. Other bytes under the same name are another version: the
name moves on, the old version drains until its last request has finished, then it is gone. A pin
belongs to the name, so the new version has it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from loramux.adapters.feed import EventFeed
from loramux.adapters.pins import Pins
from loramux.errors import AdapterConflict, AdapterExists, AdapterNotFound, Forbidden, UnknownModel
from loramux.status import AdapterStatus
from loramux.types import AdapterRef, AdapterUse

NOT_SERVED = "none"  # as the expected digest: the name must not be served yet

# What is pinned, by digest, and which of it counts on the device already.
OnPins = Callable[[Mapping[str, AdapterRef], frozenset[str]], None]


@dataclass(slots=True)
class _Version:
    ref: AdapterRef
    names: set[str] = field(default_factory=set)
    users: int = 0
    load_s: float | None = None
    loaded_at_s: float | None = None
    last_used_s: float | None = None


class Registry:
    """Who is served under which name, and how many requests still need which version."""

    def __init__(
        self,
        reserved_names: Sequence[str] = (),
        on_gone: Callable[[str], None] | None = None,
        *,
        max_loras: int = 1,
        max_names: int | None = None,
        on_pins: OnPins | None = None,
        feed: EventFeed | None = None,
    ):
        """`max_loras` are the places that pins and requests share; at most `max_names` names are
        served at once (None: any number). `on_gone` and `on_pins` are called under the lock."""
        self._reserved = frozenset(reserved_names)
        self._on_gone = on_gone
        self._on_pins = on_pins
        self._max_names = max_names
        self.feed = feed or EventFeed()
        self._lock = threading.RLock()
        self._current: dict[str, str] = {}  # name -> digest
        self._versions: dict[str, _Version] = {}  # digest -> version
        self._loading: set[str] = set()
        self._pins = Pins(max_loras)
        self._told: tuple[list[str], frozenset[str]] = ([], frozenset())

    # --- changes -------------------------------------------------------------------------------

    @contextmanager
    def loading(
        self,
        name: str,
        *,
        replace: bool = False,
        expected: str | None = None,
        pinned: bool | None = None,
    ) -> Iterator[None]:
        """Hold `name` while its files are read. Raises what `check_change` does; a second load of
        the name meanwhile is AdapterExists."""
        with self._lock:
            self.check_change(name, replace=replace, expected=expected, pinned=pinned)
            self._loading.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._loading.discard(name)

    def check_change(
        self,
        name: str,
        *,
        replace: bool = False,
        expected: str | None = None,
        pinned: bool | None = None,
    ) -> None:
        """Raise AdapterExists, AdapterConflict, PinRefused or Forbidden if a load would fail now."""
        with self._lock:
            if name in self._reserved:
                raise AdapterExists(f"{name!r} is the base model's name", field="lora_name")
            if name in self._loading:
                raise AdapterExists(f"{name!r} is being loaded by another call", field="lora_name")
            self._check_expected(name, expected)
            if name in self._current and not replace:
                raise AdapterExists(
                    f"an adapter {name!r} is already served",
                    field="lora_name",
                    remedy="unload it first, or set load_inplace to replace it",
                )
            if pinned:
                self._pins.check(name)
            names = len(self._loading.union(self._current))
            if (
                self._max_names is not None
                and names >= self._max_names
                and (name not in self._current)
            ):
                raise Forbidden(
                    f"{names} adapters are served or being loaded, which is all this server allows",
                    field="lora_name",
                    remedy="unload one, or start it with a larger --max-registered-adapters",
                )

    def publish(
        self,
        ref: AdapterRef,
        load_s: float | None = None,
        *,
        expected: str | None = None,
        pinned: bool | None = None,
    ) -> AdapterRef:
        """Point `ref.name` at this version; the version it pointed at before starts to drain.

        Raises AdapterConflict if that is not `expected` (a digest, the first 12 digits of one or more,
        or NOT_SERVED), PinRefused if it cannot be `pinned`, and then nothing has changed. `pinned`
        None leaves the name's pin as it is.
        """
        with self._lock:
            self._check_expected(ref.name, expected)
            if pinned:
                self._pins.check(ref.name)
            version = self._versions.setdefault(ref.digest, _Version(ref))
            version.ref = ref  # the newest source: an older folder may have been deleted
            version.names.add(ref.name)
            version.load_s = load_s if load_s is not None else version.load_s
            version.loaded_at_s = time.time()
            before = self._current.get(ref.name)
            self._current[ref.name] = ref.digest
            if before is None:
                self.feed.tell("registered", ref.name, ref.digest)
            elif before != ref.digest:
                self.feed.tell("replaced", ref.name, ref.digest, previous=before)
            if pinned is not None:
                self._set_pin(ref.name, pinned)
            self._repin()
            if before is not None and before != ref.digest:
                self._drop_name(before, ref.name)
            return ref

    def remove(self, name: str, *, expected: str | None = None) -> AdapterRef:
        """Stop serving `name`. Requests in flight finish on it. Raises AdapterNotFound, or
        AdapterConflict if its version is not `expected`."""
        with self._lock:
            if name not in self._current:
                raise AdapterNotFound(f"no adapter {name!r} is served", field="lora_name")
            self._check_expected(name, expected)
            digest = self._current.pop(name)
            ref = self._versions[digest].ref
            self._pins.names.discard(name)
            self._repin()
            self._drop_name(digest, name)
            return replace(ref, name=name)

    def pin(self, name: str, pinned: bool = True) -> AdapterRef:
        """Keep the current and every later version of `name` where it is used, or no longer.

        Raises AdapterNotFound or PinRefused.
        """
        with self._lock:
            if (ref := self.current(name)) is None:
                raise AdapterNotFound(f"no adapter {name!r} is served", field="lora_name")
            if pinned:
                self._pins.check(name)
            self._set_pin(name, pinned)
            self._repin()
            return ref

    def check_pin(self, name: str) -> None:
        """Raise PinRefused if `name`, served or not, cannot be pinned beside the others."""
        with self._lock:
            self._pins.check(name)

    def unpin_failed(self, digest: str) -> None:
        """A pinned version did not arrive on the device: its names are pinned no longer."""
        with self._lock:
            for name in [n for n in self._pins.names if self._current.get(n) == digest]:
                self._set_pin(name, False)
            self._repin()

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Nobody else changes or takes a version meanwhile; keep it short."""
        with self._lock:
            yield

    # --- users ---------------------------------------------------------------------------------

    def acquire(self, uses: Sequence[AdapterUse]) -> tuple[tuple[AdapterRef, float], ...]:
        """Turn names into versions and count a user on each. Raises UnknownModel, or InvalidField
        where pins leave too few places, having taken none."""
        with self._lock:
            digests = self._digests_of(uses)
            self._pins.admit(set(digests), self._pinned())
            self._pins.enter(frozenset(digests))
            now = time.time()
            for digest in digests:
                self._versions[digest].users += 1
                self._versions[digest].last_used_s = now
            return tuple(
                (self._versions[d].ref, use.scale) for d, use in zip(digests, uses, strict=True)
            )

    def release(self, digests: Sequence[str]) -> None:
        """Give back what one `acquire` counted; a draining version without users is gone."""
        with self._lock:
            if self._pins.leave(frozenset(digests)):
                self._repin()
            self._give_back(digests)

    def hold(self, uses: Sequence[AdapterUse]) -> tuple[AdapterUse, ...]:
        """`uses` with the versions that their names have now, which stay until `let_go`: a prompt is
        made for them before it is a request. Raises UnknownModel."""
        with self._lock:
            digests = self._digests_of(uses)
            for digest in digests:
                self._versions[digest].users += 1
            return tuple(replace(u, version=d) for u, d in zip(uses, digests, strict=True))

    def let_go(self, held: Sequence[AdapterUse]) -> None:
        """Give back what one `hold` counted."""
        with self._lock:
            self._give_back([use.version for use in held])

    def refs(self, uses: Sequence[AdapterUse]) -> tuple[tuple[AdapterRef, float], ...]:
        """The versions that `uses` mean, with their scales. Raises UnknownModel."""
        with self._lock:
            digests = self._digests_of(uses)
            return tuple(
                (self._versions[d].ref, use.scale) for d, use in zip(digests, uses, strict=True)
            )

    # --- questions -----------------------------------------------------------------------------

    def current(self, name: str) -> AdapterRef | None:
        """The version that `name` points at, under that name."""
        with self._lock:
            digest = self._current.get(name)
            if digest is None:
                return None
            ref = self._versions[digest].ref
            return ref if ref.name == name else replace(ref, name=name)

    def version(self, digest: str) -> AdapterRef | None:
        """A version that is served or has users, with its newest source."""
        with self._lock:
            version = self._versions.get(digest)
            return version.ref if version else None

    def is_draining(self, digest: str) -> bool:
        """Whether it has users, and no name any more."""
        with self._lock:
            version = self._versions.get(digest)
            return version is not None and not version.names

    def names(self) -> list[str]:
        with self._lock:
            return list(self._current)

    def users(self, digest: str) -> int:
        with self._lock:
            version = self._versions.get(digest)
            return version.users if version else 0

    def load_s(self, digest: str) -> float | None:
        with self._lock:
            version = self._versions.get(digest)
            return version.load_s if version else None

    def statuses(
        self, on_host: Callable[[str], bool], on_device: Callable[[str], bool]
    ) -> list[AdapterStatus]:
        """One entry a served name, then one for each version that drains."""
        with self._lock:
            pairs = [(name, self._versions[digest]) for name, digest in self._current.items()]
            pairs += [(v.ref.name, v) for v in self._versions.values() if not v.names]
            return [
                AdapterStatus(
                    ref=v.ref if v.ref.name == name else replace(v.ref, name=name),
                    users=v.users,
                    on_host=on_host(v.ref.digest),
                    on_device=on_device(v.ref.digest),
                    load_s=v.load_s,
                    state="ready" if v.names else "draining",
                    pinned=bool(v.names) and name in self._pins.names,
                    loaded_at_s=v.loaded_at_s,
                    last_used_s=v.last_used_s,
                )
                for name, v in pairs
            ]

    def check_integrity(self) -> None:
        """Nothing in flight: no users left, no version without a name."""
        with self._lock:
            assert all(v.users == 0 for v in self._versions.values()), "adapter users leaked"
            assert all(v.names for v in self._versions.values()), "a nameless version stayed"
            assert set(self._current.values()) == set(self._versions), "names and versions differ"
            assert self._pins.names <= set(self._current), "a pin outlived its name"
            assert self._pins.is_empty, "a request is still counted"

    # --- under the lock ------------------------------------------------------------------------

    def _digests_of(self, uses: Sequence[AdapterUse]) -> list[str]:
        """Raises UnknownModel for a name that is not served, and a version that is gone."""
        found = [use.version or self._current.get(use.name, "") for use in uses]
        if unknown := [u.name for u, d in zip(uses, found, strict=True) if d not in self._versions]:
            raise UnknownModel(
                f"no adapter {', '.join(map(repr, unknown))} is served", field="lora"
            )
        return found

    def _give_back(self, digests: Sequence[str]) -> None:
        now = time.time()
        for digest in digests:
            version = self._versions[digest]
            version.users -= 1
            version.last_used_s = now
            assert version.users >= 0, "released more often than acquired. This is a bug."
            self._collect(version)

    def _check_expected(self, name: str, expected: str | None) -> None:
        if expected is None:
            return
        current = self._current.get(name)
        if current is None and expected == NOT_SERVED:
            return
        if current is not None and expected != NOT_SERVED and current.startswith(expected.lower()):
            return
        found = f"has the digest {current}" if current else "is not served"
        raise AdapterConflict(
            f"the adapter {name!r} {found}, and {expected!r} was expected",
            current_digest=current,
            remedy="look at what is served now, and decide again",
        )

    def _set_pin(self, name: str, pinned: bool) -> None:
        if pinned == (name in self._pins.names):
            return
        (self._pins.names.add if pinned else self._pins.names.discard)(name)
        self.feed.tell("pinned" if pinned else "unpinned", name, self._current[name])

    def _pinned(self) -> list[str]:
        """Digests, in a fixed order."""
        return list(dict.fromkeys(self._current[name] for name in sorted(self._pins.names)))

    def _repin(self) -> None:
        """Choose again which pins are granted, and tell who keeps the places."""
        pinned = self._pinned()
        self._pins.grant(pinned)
        told = (pinned, self._pins.granted)
        if self._on_pins is not None and told != self._told:
            self._told = told
            self._on_pins({d: self._versions[d].ref for d in pinned}, self._pins.granted)

    def _drop_name(self, digest: str, name: str) -> None:
        version = self._versions[digest]
        version.names.discard(name)
        if version.users and not version.names:
            self.feed.tell("draining", name, digest)
        self._collect(version)

    def _collect(self, version: _Version) -> None:
        if not version.names and version.users == 0:
            del self._versions[version.ref.digest]
            self.feed.tell("gone", version.ref.name, version.ref.digest)
            if self._on_gone is not None:
                self._on_gone(version.ref.digest)
