"""Ranks as threads of the test's process: they come up at once, and share its tiny model's cost.

Nothing in loramux is global to a process, so a rank does not notice. `tests/unit/test_team.py` has
ranks in processes, as users do.
"""

from __future__ import annotations

import socket
import threading

import pytest

from loramux.engine import team
from loramux.engine.follower import follow
from loramux.engine.link import Link


class ThreadRank:
    """One rank, as `team.Process`."""

    def __init__(self, end: socket.socket, rank: int):
        self.link = Link(end.dup())
        self.codes: list[int] = []
        arguments = (self.link, self.codes.append)
        self.thread = threading.Thread(
            target=follow, args=arguments, name=f"rank-{rank}", daemon=True
        )
        self.thread.start()

    def kill(self) -> None:
        self.link.close()

    def wait(self, timeout: float | None = None) -> int:
        self.thread.join(timeout)
        return self.codes[0] if self.codes else 0


@pytest.fixture(scope="module")
def thread_ranks():
    """While it is used, ranks are threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(team, "spawn", ThreadRank)
        yield
