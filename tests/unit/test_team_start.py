"""A start of several ranks that is broken off leaves neither a process nor a file behind."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from loramux import LLM
from loramux.config import EngineConfig
from loramux.engine import team
from loramux.engine.team import Team
from loramux.errors import EngineStopped
from tiny import TinyWorld


@pytest.mark.parametrize("moment", ["_wait_here", "facts", "wait_ready"])
def test_an_interrupted_start_leaves_nothing(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    spawn, spawned = team.spawn, []

    def remembered(end: socket.socket, rank: int) -> Any:
        spawned.append(process := spawn(end, rank))
        return process

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(team, "spawn", remembered)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Team, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        LLM(str(tiny_world.model), device="cpu", tensor_parallel_size=2)
    (process,) = spawned
    assert isinstance(process, subprocess.Popen) and process.poll() is not None
    assert not list(tmp_path.glob("loramux-*"))


@pytest.mark.parametrize("how", ["given up", "lost"])
def test_no_rank_is_started_once_others_are_ended(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread, between two ranks."""
    begun, spawn, spawned = [], team.spawn, []
    begin = Team._begin

    def remembered(self: Team, *args: Any) -> None:
        begun.append(self)
        begin(self, *args)

    def ending(end: socket.socket, rank: int) -> Any:
        spawned.append(process := spawn(end, rank))
        begun[0]._closing = how == "given up"
        begun[0].lost = EngineStopped("rank 1 is lost") if how == "lost" else None
        return process

    monkeypatch.setattr(Team, "_begin", remembered)
    monkeypatch.setattr(team, "spawn", ending)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(EngineStopped, match=how):
        Team(["cpu"] * 3, EngineConfig(model="none", tensor_parallel_size=3), 1)
    (process,) = spawned
    assert process.poll() is not None
    assert not list(tmp_path.glob("loramux-*"))


def test_a_forked_process_ends_nothing(tmp_path: Path) -> None:
    forked = Team.__new__(Team)
    forked._owner, forked._folder = os.getppid(), str(tmp_path)
    forked._abandon()
    assert tmp_path.exists()
