"""What the caller of a request may do, known from its API key."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from starlette.types import Scope

from loramux.config.keys import ApiKey, hash_of
from loramux.config.server import ServerConfig
from loramux.errors import Forbidden

SCOPE_KEY = "loramux.access"


@dataclass(frozen=True, slots=True)
class Access:
    """The rights of a caller; `key` is None where they are not limited."""

    key: ApiKey | None = None

    def may_use(self, adapter: str) -> bool:
        return self.key is None or self.key.may_use(adapter)

    def may_see(self, adapter: str) -> bool:
        """Whether lists of adapters show it: to whom it serves, and to administrators."""
        return self.is_admin or self.may_use(adapter)

    @property
    def is_admin(self) -> bool:
        return self.key is None or self.key.admin

    def check_use(self, adapter: str, *, field: str) -> None:
        """Raise Forbidden, whether or not there is such an adapter."""
        if not self.may_use(adapter):
            raise Forbidden(
                f"this API key may not use the adapter {adapter!r}",
                field=field,
                remedy="GET /v1/models lists what it may use",
            )

    def check_admin(self) -> None:
        """Raise Forbidden unless the caller may change adapters."""
        if not self.is_admin:
            raise Forbidden("this API key may not change adapters", remedy="use an admin's")


class Keyring:
    """All keys of a server. Only hashes are kept and compared."""

    def __init__(self, single: str | None, keys: Iterable[ApiKey] = ()) -> None:
        """`single` is the key of `--api-key`, which may do everything."""
        self._entries = [(bytes.fromhex(key.sha256), Access(key)) for key in keys]
        if single is not None:
            self._entries.append((bytes.fromhex(hash_of(single)), Access()))

    @classmethod
    def of(cls, config: ServerConfig) -> Keyring:
        """The keys that `config` names. Raises ConfigError when its file cannot be read."""
        single = config.api_key.get_secret_value() if config.api_key is not None else None
        return cls(single, config.all_keys())

    def __bool__(self) -> bool:
        return bool(self._entries)

    def find(self, given: bytes) -> Access | None:
        """The rights of a key, in a time that tells nothing about which one it is or resembles."""
        digest, found = hashlib.sha256(given).digest(), None
        for expected, access in self._entries:
            if hmac.compare_digest(digest, expected):
                found = access
        return found


def access_of_scope(scope: Scope) -> Access:
    """What the gate has found; everything where there is no gate."""
    found = scope.get(SCOPE_KEY)
    return found if isinstance(found, Access) else Access()


def _access_of(request: Request) -> Access:
    return access_of_scope(request.scope)


Caller = Annotated[Access, Depends(_access_of)]
