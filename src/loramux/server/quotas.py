"""Limits of adapters at the door: how many answers, how fast, how many tokens. See `config.limits`.

A request is admitted whole or not at all, before any of it reaches the engine; in a sum every adapter
is charged, and each must admit it. What is counted belongs to the adapter's name, whatever version is
served. Used from the event loop alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from loramux.config import EngineConfig
from loramux.config.limits import BASE_TENANT, AdapterLimits
from loramux.errors import InvalidField, QuotaReached

RETRY_S = 1.0  # where only others' answers make room, nobody knows when
MINUTE_S = 60.0
MOST_QUOTAS = 4096  # when there are so many, those that are as new are forgotten

Clock = Callable[[], float]


class Bucket:
    """So many a minute, a minute's worth at once. It may be overdrawn, and then has to fill again."""

    def __init__(self, per_minute: float, clock: Clock):
        self.size = per_minute
        self._clock = clock
        self._level = per_minute
        self._at = clock()

    def wait_s(self, count: float) -> float:
        """Seconds until `count` may be taken; more than fits may when it is full."""
        missing = min(count, self.size) - self._filled()
        return max(0.0, missing * MINUTE_S / self.size)

    @property
    def is_full(self) -> bool:
        return self._filled() >= self.size

    def take(self, count: float) -> None:
        self._level = self._filled() - count

    def _filled(self) -> float:
        now = self._clock()
        self._level = min(self.size, self._level + (now - self._at) * self.size / MINUTE_S)
        self._at = now
        return self._level


class Quota:
    """What one adapter has in flight and has used."""

    def __init__(self, name: str, limits: AdapterLimits, clock: Clock):
        self.name = name
        self.limits = limits
        self.open = 0  # answers that have not ended
        self.waiting = 0  # of these, those that have no token yet
        self.requests = self._bucket(limits.requests_per_minute, clock)
        self.tokens = self._bucket(limits.tokens_per_minute, clock)

    @staticmethod
    def _bucket(per_minute: float | None, clock: Clock) -> Bucket | None:
        return None if per_minute is None else Bucket(per_minute, clock)

    @property
    def is_untouched(self) -> bool:
        """Whether a new one would be the same."""
        buckets = [bucket for bucket in (self.requests, self.tokens) if bucket is not None]
        return not self.open and all(bucket.is_full for bucket in buckets)

    def check(self, answers: int, tokens: int) -> None:
        """Raise QuotaReached naming each limit that is reached, or InvalidField where it always is."""
        limits = self.limits
        waits: dict[tuple[str, float], float] = {}
        most = limits.max_concurrency
        if most is not None and answers > most:
            raise InvalidField(
                f"{answers} answers are more than max_concurrency of {self._shown} ({most})",
                field="n",
                remedy="ask for fewer at once",
            )
        if most is not None and self.open + answers > most:
            waits["max_concurrency", most] = RETRY_S
        if limits.max_waiting is not None and self.waiting >= limits.max_waiting:
            waits["max_waiting", limits.max_waiting] = RETRY_S
        if self.requests is not None and (wait_s := self.requests.wait_s(answers)) > 0:
            waits["requests_per_minute", self.requests.size] = wait_s
        if self.tokens is not None and (wait_s := self.tokens.wait_s(tokens)) > 0:
            waits["tokens_per_minute", self.tokens.size] = wait_s
        if waits:
            named = [f"{name} ({value:g})" for name, value in waits]
            raise QuotaReached(
                f"{self._shown} has reached {' and '.join(named)}",
                adapter=self.name,
                limit=max(waits, key=waits.__getitem__)[0],
                retry_after_s=max(waits.values()),
            )

    @property
    def _shown(self) -> str:
        return f"adapter {self.name!r}" if self.name else "the base model"


class Grant:
    """One admitted request: what it may have in flight, until it is closed."""

    def __init__(self, quotas: list[Quota], answers: int):
        self._quotas = quotas
        self._open = set(range(answers))
        self._waiting = set(range(answers))
        self._add(answers, answers)

    def saw(self, answer: int, tokens: int, *, finished: bool) -> None:
        """News of one answer: so many more tokens, and whether it has ended."""
        if not self._quotas:
            return
        for quota in self._quotas:
            if quota.tokens is not None and tokens:
                quota.tokens.take(tokens)
        if answer in self._waiting and (tokens or finished):
            self._waiting.discard(answer)
            self._add(0, -1)
        if finished and answer in self._open:
            self._open.discard(answer)
            self._add(-1, 0)

    def close(self) -> None:
        """Give back what has not ended; once, however often it is called."""
        self._add(-len(self._open), -len(self._waiting))
        self._open.clear()
        self._waiting.clear()

    def _add(self, answers: int, waiting: int) -> None:
        for quota in self._quotas:
            quota.open += answers
            quota.waiting += waiting


class Quotas:
    """All adapters that have limits."""

    def __init__(self, config: EngineConfig, clock: Clock = time.monotonic):
        self._config = config
        self._clock = clock
        self._quotas: dict[str, Quota] = {}

    def check(self, adapters: Iterable[str]) -> None:
        """Raise QuotaReached if one answer could not be admitted now, before it costs anything."""
        for quota in self._of(adapters):
            quota.check(1, 0)

    def admit(self, adapters: Iterable[str], answers: int, tokens: int) -> Grant:
        """Take in a request with so many answers and tokens of prompts. Raises QuotaReached or
        InvalidField, and then nothing is counted."""
        quotas = self._of(adapters)
        for quota in quotas:
            quota.check(answers, tokens)
        for quota in quotas:
            if quota.requests is not None:
                quota.requests.take(answers)
            if quota.tokens is not None:
                quota.tokens.take(tokens)
        return Grant(quotas, answers)

    def limits_of(self, adapter: str) -> AdapterLimits:
        """Those in force for an adapter; "" is the base model."""
        return self._config.limits_of(adapter)

    def _of(self, adapters: Iterable[str]) -> list[Quota]:
        """The quotas of those that have any."""
        names = sorted(set(adapters)) or [BASE_TENANT]
        found = (self._quota(name) for name in names) if self._config.adapter_limits else ()
        return [quota for quota in found if quota is not None]

    def _quota(self, name: str) -> Quota | None:
        if (quota := self._quotas.get(name)) is None:
            limits = self._config.limits_of(name)
            if not limits.quotas:
                return None
            if len(self._quotas) >= MOST_QUOTAS:
                self._quotas = {n: q for n, q in self._quotas.items() if not q.is_untouched}
            quota = self._quotas[name] = Quota(name, limits, self._clock)
        return quota
