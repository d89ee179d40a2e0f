"""Names, versions and users of adapters. Torch-free; safe to call from any thread.

    name --current--> version (one digest) --name moved on or removed--> drains --last user--> gone

A name points at one version at a time. Other bytes under the same name are another version: the
name moves on, the old version drains until its last request has finished, then it is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from loramux.errors import AdapterExists, AdapterNotFound, UnknownModel
from loramux.types import AdapterRef, AdapterUse


@dataclass(slots=True)
class _Version:
    ref: AdapterRef
    names: set[str] = field(default_factory=set)
    users: int = 0
    load_s: float | None = None


class Registry:
    """Who is served under which name, and how many requests still need which version."""

    def __init__(
        self, reserved_names: Sequence[str] = (), on_gone: Callable[[str], None] | None = None
    ):
        self._reserved = frozenset(reserved_names)
        self._on_gone = on_gone
        self._lock = threading.RLock()
        self._current: dict[str, str] = {}  # name -> digest
        self._versions: dict[str, _Version] = {}  # digest -> version
        self._loading: set[str] = set()

    @contextmanager
    def loading(self, name: str, *, replace: bool = False) -> Iterator[None]:
        """Hold `name` while its files are read; a second load of it meanwhile is AdapterExists."""
        with self._lock:
            if name in self._reserved:
                raise AdapterExists(f"{name!r} is the base model's name", field="lora_name")
            if name in self._loading:
                raise AdapterExists(f"{name!r} is being loaded by another call", field="lora_name")
            if name in self._current and not replace:
                raise AdapterExists(
                    f"an adapter {name!r} is already served",
                    field="lora_name",
                    remedy="unload it first, or set load_inplace to replace it",
                )
            self._loading.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._loading.discard(name)

    def publish(self, ref: AdapterRef, load_s: float | None = None) -> AdapterRef:
        """Point `ref.name` at this version; the version it pointed at before starts to drain."""
        with self._lock:
            version = self._versions.setdefault(ref.digest, _Version(ref))
            version.ref = ref  # the newest source: an older folder may have been deleted
            version.names.add(ref.name)
            version.load_s = load_s if load_s is not None else version.load_s
            before = self._current.get(ref.name)
            self._current[ref.name] = ref.digest
            if before is not None and before != ref.digest:
                self._drop_name(before, ref.name)
            return ref

    def remove(self, name: str) -> AdapterRef:
        """Stop serving `name`. Requests in flight finish on it. Raises AdapterNotFound."""
        with self._lock:
            digest = self._current.pop(name, None)
            if digest is None:
                raise AdapterNotFound(f"no adapter {name!r} is served", field="lora_name")
            ref = self._versions[digest].ref
            self._drop_name(digest, name)
            return ref

    def acquire(self, uses: Sequence[AdapterUse]) -> tuple[tuple[AdapterRef, float], ...]:
        """Turn names into versions and count a user on each. Raises UnknownModel, having taken none."""
        with self._lock:
            unknown = [use.name for use in uses if use.name not in self._current]
            if unknown:
                raise UnknownModel(
                    f"no adapter {', '.join(map(repr, unknown))} is served", field="lora"
                )
            digests = [self._current[use.name] for use in uses]
            for digest in digests:
                self._versions[digest].users += 1
            return tuple(
                (self._versions[d].ref, use.scale) for d, use in zip(digests, uses, strict=True)
            )

    def release(self, digests: Sequence[str]) -> None:
        """Give back what `acquire` counted; a draining version without users is gone."""
        with self._lock:
            for digest in digests:
                version = self._versions[digest]
                version.users -= 1
                assert version.users >= 0, "released more often than acquired. This is a bug."
                self._collect(version)

    def current(self, name: str) -> AdapterRef | None:
        """The version that `name` points at, under that name."""
        with self._lock:
            digest = self._current.get(name)
            if digest is None:
                return None
            ref = self._versions[digest].ref
            return ref if ref.name == name else replace(ref, name=name)

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

    def check_integrity(self) -> None:
        """Nothing in flight: no users left, no version without a name."""
        with self._lock:
            assert all(v.users == 0 for v in self._versions.values()), "adapter users leaked"
            assert all(v.names for v in self._versions.values()), "a nameless version stayed"
            assert set(self._current.values()) == set(self._versions), "names and versions differ"

    def _drop_name(self, digest: str, name: str) -> None:
        version = self._versions[digest]
        version.names.discard(name)
        self._collect(version)

    def _collect(self, version: _Version) -> None:
        if not version.names and version.users == 0:
            del self._versions[version.ref.digest]
            if self._on_gone is not None:
                self._on_gone(version.ref.digest)
