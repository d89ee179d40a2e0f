"""Prometheus metrics of one app, in a registry of its own.

The label `adapter` is the adapter's name, "a+b" for a composition, "" for the base model and
"(other)" for what is beyond the bounds: adapters no longer served, or more than MAX_LABELS at once.
The series of an adapter go when it is unloaded, so their number stays bounded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from loramux.errors import QuotaReached
from loramux.status import AdapterStatus, EngineStats
from loramux.types import AdapterRef, AdapterUse, Delta

if TYPE_CHECKING:  # importing the engine for real would import torch
    from loramux.engine.service import AsyncEngine

BASE_LABEL = ""
OTHER_LABEL = "(other)"
MAX_LABELS = 1000

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
LOAD_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

# Cumulative fields of EngineStats -> metric name and help.
ENGINE_COUNTERS = {
    "steps": ("loramux_engine_steps", "Steps of the engine loop."),
    "preemptions": ("loramux_preemptions", "Requests put back: too few blocks, places or seats."),
    "prefix_queries": ("loramux_prefix_cache_queries", "Tokens looked up in the prefix cache."),
    "prefix_hits": ("loramux_prefix_cache_hits", "Tokens found in the prefix cache."),
    "media_queries": (
        "loramux_encoder_cache_queries",
        "Images, sounds and videos that steps needed.",
    ),
    "media_hits": ("loramux_encoder_cache_hits", "Of these, those whose vectors were kept."),
    "device_loads": ("loramux_adapter_device_loads", "Adapters copied to the device."),
    "device_evictions": ("loramux_adapter_device_evictions", "Adapters evicted from the device."),
    "host_loads": ("loramux_adapter_host_loads", "Adapters read into host memory."),
    "host_evictions": ("loramux_adapter_host_evictions", "Adapters evicted from host memory."),
}


# Name, help and upper bounds in seconds; in the order in which Metrics keeps them.
HISTOGRAMS = (
    (
        "loramux_time_to_first_token_seconds",
        "From the request to the first token of an answer.",
        FIRST_TOKEN_BUCKETS,
    ),
    (
        "loramux_inter_token_latency_seconds",
        "Time between two tokens of one answer.",
        TOKEN_BUCKETS,
    ),
    (
        "loramux_e2e_request_latency_seconds",
        "From the request to the end of an answer.",
        REQUEST_BUCKETS,
    ),
    (
        "loramux_adapter_load_seconds",
        "Time to read an adapter into host memory.",
        LOAD_BUCKETS,
    ),
)


class EngineCollector:
    """Asks the engine for its numbers at each scrape; keeps nothing."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, (metric, text) in ENGINE_COUNTERS.items():
            yield CounterMetricFamily(metric, text, value=getattr(stats, name))
        yield from _gauges(stats)
        yield from _residency(stats.adapters)
        yield from _tenants(stats)


def _gauges(stats: EngineStats) -> Iterator[Metric]:
    used = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
    yield GaugeMetricFamily("loramux_requests_running", "Requests in the batch.", stats.running)
    yield GaugeMetricFamily("loramux_requests_waiting", "Requests in the queue.", stats.waiting)
    yield GaugeMetricFamily("loramux_kv_cache_usage_ratio", "Share of KV blocks in use.", used)
    yield GaugeMetricFamily(
        "loramux_adapter_host_bytes", "Host memory of adapters.", stats.adapter_host_bytes
    )
    yield GaugeMetricFamily(
        "loramux_adapter_device_bytes",
        "Device memory of adapters that have a place, of each rank.",
        stats.adapter_device_bytes,
    )
    memory = GaugeMetricFamily(
        "loramux_memory_planned_bytes",
        "Memory of the device, as planned at start.",
        labels=["part"],
    )
    for part, num_bytes in stats.memory.items():
        memory.add_metric([part], num_bytes)
    yield memory


def _residency(adapters: Iterable[AdapterStatus]) -> Iterator[Metric]:
    labels = ["adapter", "digest"]
    device = GaugeMetricFamily(
        "loramux_adapter_on_device", "1 if this version is on the device.", labels=labels
    )
    host = GaugeMetricFamily(
        "loramux_adapter_on_host", "1 if this version is in host memory.", labels=labels
    )
    users = GaugeMetricFamily(
        "loramux_adapter_users", "Unfinished requests of this version.", labels=labels
    )
    pinned = GaugeMetricFamily(
        "loramux_adapter_pinned", "1 if this version is pinned.", labels=labels
    )
    for status in {(s.ref.name, s.ref.digest): s for s in adapters}.values():
        key = [status.ref.name, status.ref.digest]
        pinned.add_metric(key, float(status.pinned))
        device.add_metric(key, float(status.on_device))
        host.add_metric(key, float(status.on_host))
        users.add_metric(key, status.users)
    yield from (device, host, users, pinned)


def _tenants(stats: EngineStats) -> Iterator[Metric]:
    """What each served adapter, and the base model, has in flight; a sum counts for each of its own."""
    running = GaugeMetricFamily(
        "loramux_adapter_answers_running", "Answers in the batch.", labels=["adapter"]
    )
    waiting = GaugeMetricFamily(
        "loramux_adapter_answers_waiting", "Answers in the queue.", labels=["adapter"]
    )
    tokens = CounterMetricFamily(
        "loramux_adapter_computed_tokens",
        "Tokens computed, of prompts and answers; by these adapters share.",
        labels=["adapter"],
    )
    names = {BASE_LABEL, *(status.ref.name for status in stats.adapters)}
    for tenant in [tenant for tenant in stats.tenants if tenant.name in names][:MAX_LABELS]:
        running.add_metric([tenant.name], tenant.running)
        waiting.add_metric([tenant.name], tenant.waiting)
        tokens.add_metric([tenant.name], tenant.tokens)
    yield from (running, waiting, tokens)


class Metrics:
    """What the server measures itself, and at each scrape what the engine says."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._members: dict[str, frozenset[str]] = {}  # label -> names of its adapters
        self._lock = threading.Lock()
        self.registry = CollectorRegistry()
        registry, adapter = self.registry, ["adapter"]
        self.requests = Counter(
            "loramux_requests",
            "Answers finished, by reason; each choice and each prompt counts.",
            ["adapter", "finish_reason"],
            registry=registry,
        )
        self.requests_refused = Counter(
            "loramux_requests_refused",
            "Requests refused with 429, by the limit of the adapter that was reached.",
            ["adapter", "limit"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "loramux_prompt_tokens", "Prompt tokens.", adapter, registry=registry
        )
        self.generation_tokens = Counter(
            "loramux_generation_tokens", "Tokens generated.", adapter, registry=registry
        )
        self.first_token, self.inter_token, self.end_to_end, self.load = (
            Histogram(name, text, adapter, buckets=buckets, registry=registry)
            for name, text, buckets in HISTOGRAMS
        )
        self._labelled = (
            self.prompt_tokens,
            self.generation_tokens,
            self.first_token,
            self.inter_token,
            self.end_to_end,
            self.load,
        )
        registry.register(EngineCollector(engine))
        engine.on_load(self._on_load)

    def label(self, names: Iterable[str]) -> str:
        """The label of these adapters, made known if there is room."""
        members = frozenset(names)
        if not members:
            return BASE_LABEL
        label = "+".join(sorted(members))
        with self._lock:
            if label not in self._members:
                if len(self._members) >= MAX_LABELS or not members <= self._served():
                    return OTHER_LABEL
                self._members[label] = members
        return label

    def current(self, label: str) -> str:
        """`label`, or "(other)" if its adapters have been unloaded since."""
        return label if label == BASE_LABEL or label in self._members else OTHER_LABEL

    def refused(self, error: QuotaReached) -> None:
        """Count a request that an adapter's limit refused."""
        label = self.label([error.adapter] if error.adapter else [])
        self.requests_refused.labels(label, error.limit).inc()

    def _served(self) -> set[str]:
        return {status.ref.name for status in self._engine.adapters()}

    def _on_load(self, ref: AdapterRef, seconds: float) -> None:
        # The first load of an adapter comes just before its name is served.
        with self._lock:
            if ref.name not in self._members and len(self._members) < MAX_LABELS:
                self._members[ref.name] = frozenset([ref.name])
        self.load.labels(self.current(ref.name)).observe(seconds)

    def prune(self) -> None:
        """Drop the series of adapters that are no longer served."""
        with self._lock:
            served = self._served()
            gone = [label for label, names in self._members.items() if not names <= served]
            for label in gone:
                del self._members[label]
        for label in gone:
            for metric in self._labelled:
                metric.remove_by_labels({"adapter": label})
            self.requests.remove_by_labels({"adapter": label})
            self.requests_refused.remove_by_labels({"adapter": label})

    def render(self) -> bytes:
        """The exposition text. Prunes first, since adapters may go without the server's doing."""
        self.prune()
        return generate_latest(self.registry)


class Meter:
    """Times and counts one HTTP request; `choices` is how many answers it has."""

    def __init__(self, metrics: Metrics, adapters: Sequence[AdapterUse], *, choices: int) -> None:
        self._metrics = metrics
        self._label = metrics.label(use.name for use in adapters)
        self._start_s = time.perf_counter()
        self._last_s: dict[int, float] = {}
        self._prompts: set[int] = set()
        self._unfinished = choices

    def saw(self, prompt: int, choice: int, delta: Delta, prompt_tokens: int) -> None:
        """Count one delta of a choice; the prompt's tokens count with its first delta."""
        metrics, label = self._metrics, self._metrics.current(self._label)
        now = time.perf_counter()
        if prompt not in self._prompts:
            self._prompts.add(prompt)
            metrics.prompt_tokens.labels(label).inc(prompt_tokens)
        count = len(delta.token_ids)
        if count:
            metrics.generation_tokens.labels(label).inc(count)
            before = self._last_s.get(choice)
            if before is None:
                metrics.first_token.labels(label).observe(now - self._start_s)
            else:
                metrics.inter_token.labels(label).observe((now - before) / count)
            self._last_s[choice] = now
        if delta.finish_reason is not None:
            self._unfinished -= 1
            metrics.requests.labels(label, delta.finish_reason).inc()
            metrics.end_to_end.labels(label).observe(now - self._start_s)

    def close(self, reason: str) -> None:
        """Count what did not finish under `reason`; once, however often it is called."""
        if self._unfinished:
            label = self._metrics.current(self._label)
            self._metrics.requests.labels(label, reason).inc(self._unfinished)
            self._unfinished = 0
