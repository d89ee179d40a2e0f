"""A rank whose rank 0 goes without a word goes as well, whatever it is waiting for."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loramux.config import EngineConfig
from loramux.engine.follower import EXIT_LOST
from loramux.engine.link import Alive, Here, Link, Meet, Start, Stop
from loramux.engine.team import spawn
from tiny import TinyWorld


@contextlib.contextmanager
def _rank_1(model: Path, store: Path) -> Iterator[tuple[Link, Any]]:
    """Rank 1 of 2 that has come up, as rank 0 has it: its link and its process."""
    ours, theirs = socket.socketpair()
    process = spawn(theirs, 1)
    theirs.close()
    link = Link(ours)
    try:
        config = EngineConfig(model=str(model), device="cpu", tensor_parallel_size=2)
        link.send(Start(1, 2, str(store), config, False, 1))
        while isinstance(message := link.receive()[0], Alive):
            pass
        assert isinstance(message, Here)
        yield link, process
    finally:
        link.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.kill()
        process.wait()


def test_it_leaves_a_start_that_waits_for_rank_0(tiny_world: TinyWorld, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with _rank_1(tiny_world.model, store) as (link, process):
        link.send(Meet())
        deadline = time.monotonic() + 20
        while not (store.exists() and store.stat().st_size):
            assert time.monotonic() < deadline, "it has not joined"
            time.sleep(0.02)
        assert isinstance(link.receive()[0], Alive)  # it waits, and nothing has failed
        link.close()
        assert process.wait(10) == EXIT_LOST


def test_it_leaves_a_start_that_is_given_up(tiny_world: TinyWorld, tmp_path: Path) -> None:
    with _rank_1(tiny_world.model, tmp_path / "store") as (link, process):
        link.send(Stop())
        assert process.wait(10) == 1
