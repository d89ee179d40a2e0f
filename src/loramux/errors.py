"""Every error loramux raises on purpose, and nothing about HTTP (that table is `server/errors.py`).

    LoramuxError
    ├── RequestError (also ValueError)  the caller's fault; the message names the field and the remedy
    │   ├── InvalidField                a value or combination that cannot be served
    │   ├── PromptTooLong               prompt plus answer does not fit the context
    │   ├── UnknownModel                neither the base model nor a served adapter
    │   ├── AdapterNotFound             no such adapter name, or no such folder
    │   ├── AdapterExists               the name is served already, or collides with the base model
    │   │   └── AdapterConflict         another version is served than the one that was to be changed
    │   ├── AdapterRejected             the files are not an adapter we can serve; carries every reason
    │   ├── PinRefused                  one pin more would leave too few places for the others
    │   ├── BadMedia                    an image, sound or video that cannot be decoded, or is too large
    │   ├── MediaUnavailable            a media URL or file that gave nothing, or not in time
    │   └── Forbidden                   a path, a host or an action that the operator did not allow
    ├── ConfigError (also ValueError)   the operator's fault; loramux does not start
    │   └── UnsupportedModel            the model does not use the doors that loramux enters by
    └── EngineError                     our fault, or the machine's
        ├── EngineStopped               the engine is shutting down or has died
        │   └── ReplicaLost             the replica that had the request is gone; others are there
        ├── AdapterLoadFailed           an adapter that was accepted can no longer be read
        ├── AdapterUnloaded             the adapter was unloaded, and the time to drain is over
        ├── SourceUnavailable           where an adapter comes from gave nothing, or not in time
        └── Overloaded                  the queue is full; try again later
            └── QuotaReached            an adapter has what its limits allow; try again later

All of them survive pickling, so they may cross a process boundary unchanged.
"""

from __future__ import annotations

from typing import Any

MOST_REASONS = 64
MOST_CHARACTERS = 600  # of one reason


class LoramuxError(Exception):
    """Root of the tree. `message` is one line; `remedy`, when there is one, says what to do."""

    def __init__(self, message: str, *, field: str | None = None, remedy: str | None = None):
        self.message = message
        self.field = field
        self.remedy = remedy
        super().__init__(message)

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self.__dict__))


def _rebuild(kind: type[LoramuxError], state: dict[str, Any]) -> LoramuxError:
    error = kind.__new__(kind)
    Exception.__init__(error, state["message"])
    error.__dict__.update(state)
    return error


def _shown(text: str) -> str:
    """`text` as a log or a terminal may have it."""
    if len(text) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2 - 2  # the why stands at the end
        text = f"{text[:half]}...{text[-half:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class RequestError(LoramuxError, ValueError):
    """The caller's fault."""


class InvalidField(RequestError):
    """A field of the request has a value that cannot be served."""


class PromptTooLong(RequestError):
    """The prompt, or the prompt and the answer asked for, do not fit the model's context."""


class UnknownModel(RequestError):
    """The name is neither the base model nor a served adapter."""


class AdapterNotFound(RequestError):
    """There is no adapter of that name, or no such folder."""


class AdapterExists(RequestError):
    """The name is taken."""


class AdapterConflict(AdapterExists):
    """Another version is served than the caller expected; `current_digest` is its, None if none is."""

    def __init__(self, message: str, *, current_digest: str | None, remedy: str | None = None):
        super().__init__(message, field="expected_digest", remedy=remedy)
        self.current_digest = current_digest


class PinRefused(RequestError):
    """One pinned adapter more would leave too few places for those that are not pinned."""


class AdapterRejected(RequestError):
    """The files are no adapter that can be served as it is; `reasons` lists every cause found.

    Reasons quote the files of strangers: what cannot be printed is escaped, and both their length and
    their number are bounded."""

    def __init__(self, name: str, reasons: list[str], *, remedy: str | None = None):
        self.adapter = name
        self.reasons = [_shown(reason) for reason in reasons[:MOST_REASONS]]
        if len(reasons) > MOST_REASONS:
            self.reasons.append(f"and {len(reasons) - MOST_REASONS} more reasons")
        listed = "; ".join(self.reasons)
        super().__init__(f"adapter {name!r} is refused: {listed}", field="lora_path", remedy=remedy)


class BadMedia(RequestError):
    """An image, a sound or a video that cannot be decoded, or is larger than allowed."""


class MediaUnavailable(RequestError):
    """The URL or file that a request names as its media gave nothing, or not in time."""


class Forbidden(RequestError):
    """A path, a host or an action that the operator did not allow."""


class ConfigError(LoramuxError, ValueError):
    """The operator's settings contradict each other, the model or the machine."""


class UnsupportedModel(ConfigError):
    """The model does not use the public doors by which loramux enters it."""


class EngineError(LoramuxError):
    """Not the caller's fault."""


class EngineStopped(EngineError):
    """The engine is shutting down or has died; the request was not finished."""


class ReplicaLost(EngineStopped):
    """One of several servers has gone, and with it the request; the others are there."""


class AdapterLoadFailed(EngineError):
    """An adapter that was accepted before can no longer be read from its source."""


class AdapterUnloaded(EngineError):
    """The request was not finished when its adapter, which was unloaded, had to go."""


class SourceUnavailable(EngineError):
    """Where an adapter comes from (the Hub, a bucket) gave nothing, or not in time."""


class Overloaded(EngineError):
    """Too many requests are waiting."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaReached(Overloaded):
    """An adapter's limit is reached; `limit` is its name, `adapter` "" for the base model."""

    def __init__(self, message: str, *, adapter: str, limit: str, retry_after_s: float = 1.0):
        super().__init__(message, retry_after_s=retry_after_s)
        self.adapter = adapter
        self.limit = limit
