"""API keys: who may use which adapters, and who may change them.

Keys are kept as hashes from the moment they are read. A file of keys is a JSON list:

    [{"name": "team-a", "sha256": "9f86d0…", "adapters": ["team-a/*", "shared"]},
     {"name": "deploy", "key": "a long random text", "admin": true}]
"""

from __future__ import annotations

import hashlib
import json
from fnmatch import fnmatchcase
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loramux.errors import ConfigError

MIN_KEY_LENGTH = 16  # hashes are not salted, so a key must not be guessable


class ApiKey(BaseModel):
    """One key, by its hash. Every key may use the base model."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str = Field(min_length=1)
    """What the operator calls it; clients never see it."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    """Hex SHA-256 of the key in UTF-8."""

    adapters: tuple[str, ...] = ()
    """Names of adapters it may use; `*` stands for any characters, slashes too."""

    admin: bool = False
    """Whether it may load, replace, unload and pin adapters."""

    @model_validator(mode="before")
    @classmethod
    def _hash(cls, data: Any) -> Any:
        """Take the key itself under `key`, in place of its hash."""
        if not isinstance(data, dict) or "key" not in data:
            return data
        data = dict(data)
        key = data.pop("key")
        if not isinstance(key, str) or len(key) < MIN_KEY_LENGTH:
            raise ValueError(f"key must be a text of at least {MIN_KEY_LENGTH} characters")
        if "sha256" in data:
            raise ValueError("key and sha256 are one setting; give one of them")
        return {**data, "sha256": hash_of(key)}

    @model_validator(mode="after")
    def _is_of_use(self) -> Self:
        if not all(self.adapters):
            raise ValueError("a pattern in adapters is empty")
        return self

    def may_use(self, adapter: str) -> bool:
        return any(fnmatchcase(adapter, pattern) for pattern in self.adapters)


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(path: str) -> tuple[ApiKey, ...]:
    """The keys in a file. Raises ConfigError, which names the entry and shows nothing of it."""
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise _refused(f"{path!r} cannot be read: {why}") from None
    if not isinstance(entries, list) or not entries:
        raise _refused(f"{path!r} holds no list of keys")
    keys, faults = [], []
    for number, entry in enumerate(entries):
        try:
            keys.append(ApiKey.model_validate(entry))
        except ValidationError as error:
            faults += [f"entry {number}: {_fault(fault)}" for fault in error.errors()]
    if faults:
        raise _refused(f"{path!r}: {'; '.join(faults)}")
    check_distinct(keys)
    return tuple(keys)


def check_distinct(keys: list[ApiKey] | tuple[ApiKey, ...]) -> None:
    """Raise ConfigError where two keys have one name, or are one key."""
    names, hashes = [key.name for key in keys], [key.sha256 for key in keys]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise _refused(f"two keys are called {', '.join(map(repr, twice))}")
    if len(set(hashes)) < len(hashes):
        same = [key.name for key in keys if hashes.count(key.sha256) > 1]
        raise _refused(f"{' and '.join(map(repr, same))} are one key")


def _fault(fault: Any) -> str:
    """Without the input, which may be a key."""
    where = ".".join(str(part) for part in fault["loc"])
    cause = fault.get("ctx", {}).get("error")
    text = str(cause) if cause is not None else fault["msg"]
    return f"{where}: {text}" if where else text


def _refused(message: str) -> ConfigError:
    return ConfigError(
        message,
        field="api_keys_file",
        remedy='write [{"name": ..., "sha256": ..., "adapters": [...], "admin": false}, ...]',
    )
