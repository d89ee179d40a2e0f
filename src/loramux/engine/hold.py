"""Versions of adapters that stay while a prompt is made for them: the version that answers is the one it
was tokenized for, though the name may get another one meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:  # importing it for real would import torch
    from loramux.adapters.registry import Registry
    from loramux.types import AdapterUse


class Hold:
    """`uses` with their versions, until `release` or the end of a `with`."""

    def __init__(self, registry: Registry | None, uses: Sequence[AdapterUse]):
        """Without a `registry`, or adapters, nothing is held. Raises UnknownModel."""
        self._registry = registry if uses else None
        self.uses = tuple(uses) if self._registry is None else self._registry.hold(uses)

    def release(self) -> None:
        """Once all that is asked of these versions is a request; more than once does no harm."""
        registry, self._registry = self._registry, None
        if registry is not None:
            registry.let_go(self.uses)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
