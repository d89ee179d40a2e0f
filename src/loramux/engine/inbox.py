"""What other threads tell the step loop. The only shared state besides the registry."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Inbox:
    """A list of things to do on the loop's thread, in order."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._actions: list[Callable[[], None]] = []

    def post(self, action: Callable[[], None]) -> None:
        with self._condition:
            self._actions.append(action)
            self._condition.notify()

    def drain(self) -> list[Callable[[], None]]:
        with self._condition:
            actions, self._actions = self._actions, []
            return actions

    def wait(self, timeout_s: float | None = None) -> None:
        """Sleep until something is posted, or for `timeout_s` seconds."""
        with self._condition:
            if not self._actions:
                self._condition.wait(timeout_s)

    @property
    def empty(self) -> bool:
        with self._condition:
            return not self._actions
