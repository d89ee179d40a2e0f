"""What an engine says of its adapters, its tenants and itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from loramux.types import AdapterRef

AdapterState = Literal["ready", "draining"]
AdapterPlace = Literal["disk", "host", "device"]


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """What an operator or a router wants to know about one adapter version.

    `load_s` is how long it took to read; `loaded_at_s` and `last_used_s` are seconds since the epoch.
    A version is draining when no name points at it any more and requests still use it.
    """

    ref: AdapterRef
    users: int
    on_host: bool
    on_device: bool
    load_s: float | None = None
    state: AdapterState = "ready"
    pinned: bool = False
    loaded_at_s: float | None = None
    last_used_s: float | None = None

    @property
    def place(self) -> AdapterPlace:
        """Where its weights are, the place nearest to the arithmetic."""
        return "device" if self.on_device else "host" if self.on_host else "disk"


AdapterEventKind = Literal[
    "registered",
    "replaced",
    "host-loaded",
    "device-loaded",
    "evicted",
    "pinned",
    "unpinned",
    "draining",
    "gone",
]


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """One change of an adapter version; `number` grows by one from event to event.

    `place` says from where it was evicted, `previous` which digest it replaced.
    """

    number: int
    kind: AdapterEventKind
    name: str
    digest: str
    time_s: float
    place: AdapterPlace | None = None
    previous: str | None = None


@dataclass(frozen=True, slots=True)
class Unloaded:
    """What an unload did: how many requests it ended, and whether the version's memory is free."""

    ref: AdapterRef
    ended: int = 0
    freed: bool = False


@dataclass(frozen=True, slots=True)
class TenantStatus:
    """Answers of an adapter, or of the base model (""), that are in flight, and how many tokens were
    computed for it since the start."""

    name: str
    running: int
    waiting: int
    tokens: int


@dataclass(slots=True)
class EngineStats:
    """A snapshot of counters; the cumulative ones never go down."""

    running: int = 0
    waiting: int = 0
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    media_queries: int = 0
    media_hits: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    device_loads: int = 0
    device_evictions: int = 0
    host_loads: int = 0
    host_evictions: int = 0
    adapter_host_bytes: int = 0
    adapter_device_bytes: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes planned at start for each part of the memory."""

    adapters: list[AdapterStatus] = field(default_factory=list)
    tenants: list[TenantStatus] = field(default_factory=list)
