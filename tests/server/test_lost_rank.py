"""kill -9 or -STOP one rank under load: every open request hears of it, and the server leaves with an
error. With rank 0, which is the server, the others leave."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest

from tiny import TinyWorld


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]


STOPPED = '"code":"engine_stopped"'
ON_GPUS = ["--device", "cuda", "--kv-cache-memory", "64MiB"]
EAGER = pytest.mark.parametrize("eager", [["--enforce-eager"], []], ids=["eager", "graphs"])
HOWS = pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])


@HOWS
def test_a_lost_rank_ends_the_server(tiny_world: TinyWorld, how: signal.Signals) -> None:
    _lose_a_rank(tiny_world, how, "--device", "cpu")


@pytest.mark.multigpu
@HOWS
@EAGER
def test_a_lost_rank_ends_the_server_under_nccl(
    tiny_world: TinyWorld, how: signal.Signals, eager: list[str]
) -> None:
    """Whose collectives do not notice: they wait on the device."""
    _lose_a_rank(tiny_world, how, *ON_GPUS, *eager)


def test_a_killed_server_takes_its_ranks_along(tiny_world: TinyWorld) -> None:
    _kill_the_server(tiny_world, "--device", "cpu")


def test_a_server_interrupted_at_its_start_leaves_nothing(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-m", "loramux", "serve", str(tiny_world.model), "--port", "0"]
    more = ["--tensor-parallel-size", "2", "--device", "cpu"]
    # Whoever starts the tests in the background has them, and their children, ignore it.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    server = subprocess.Popen([*command, *more], stderr=subprocess.PIPE, preexec_fn=heeding)
    try:
        deadline, ranks = time.monotonic() + 60, list[int]()
        while not ranks and time.monotonic() < deadline:
            time.sleep(0.01)
            ranks = _children(server.pid) if list(tmp_path.glob("loramux-*")) else []
        assert ranks
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)
    finally:
        server.kill()
        server.communicate()
    assert server.returncode == 130
    assert not list(tmp_path.glob("loramux-*"))
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.multigpu
@EAGER
def test_a_killed_server_takes_its_ranks_along_under_nccl(
    tiny_world: TinyWorld, eager: list[str]
) -> None:
    """Which wait for it on the device."""
    _kill_the_server(tiny_world, *ON_GPUS, *eager)


class _Clients:
    """Each asks again and again, so that requests are open whenever a rank is lost, however fast the
    machine is; until an answer says that the engine has stopped."""

    def __init__(self, url: str, model: str) -> None:
        self.url = f"{url}/v1/completions"
        self.body = {"model": model, "prompt": "abc", "max_tokens": 240, "ignore_eos": True}
        self.deadline = time.monotonic() + 30
        self.begun = threading.Event()
        """Set when an answer has begun to arrive, or is there whole."""

    def ask(self, *, stream: bool) -> httpx.Response:
        """The answer that says so."""
        while time.monotonic() < self.deadline:
            body = self.body | {"stream": stream}
            with httpx.stream("POST", self.url, json=body, timeout=30) as answer:
                self.begun.set()
                answer.read()
            if answer.status_code == 503 or (stream and STOPPED in answer.text):
                return answer
            assert answer.status_code == 200, answer.text
            assert not stream or answer.text.endswith("data: [DONE]\n\n"), answer.text
        raise AssertionError("no answer said that the engine has stopped")


@contextlib.contextmanager
def _server(tiny_world: TinyWorld, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Of two ranks, and its URL."""
    flags = ["--port", "0", "--tensor-parallel-size", "2", "--rank-timeout-s", "3", *more]
    server = subprocess.Popen(
        [sys.executable, "-m", "loramux", "serve", str(tiny_world.model), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        yield server, server.stdout.readline().strip().removeprefix("Listening on ")
    finally:
        server.kill()
        server.wait()


def _lose_a_rank(tiny_world: TinyWorld, how: signal.Signals, *more: str) -> None:
    with _server(tiny_world, *more) as (server, url):
        clients = _Clients(url, str(tiny_world.model))
        with ThreadPoolExecutor() as pool:
            kinds = (True, True, False, False)
            answers = [pool.submit(clients.ask, stream=stream) for stream in kinds]
            assert clients.begun.wait(20)
            time.sleep(0.2)
            assert not any(answer.done() for answer in answers)
            begin = time.monotonic()
            (rank,) = _children(server.pid)
            os.kill(rank, how)
            told = [answer.result() for answer in answers]
        assert time.monotonic() - begin < 10
        assert all(STOPPED in answer.text for answer in told)
        assert all(answer.status_code == 503 for answer in told[2:])
        _, errors = server.communicate(timeout=10)
        assert server.returncode not in (0, None) and "rank 1 of 2 is lost" in errors
        assert ("no sign of life for 3 s" in errors) == (how == signal.SIGSTOP)
        assert not Path(f"/proc/{rank}").exists()


def _kill_the_server(tiny_world: TinyWorld, *more: str) -> None:
    with _server(tiny_world, *more) as (server, url):
        clients = _Clients(url, str(tiny_world.model))
        with ThreadPoolExecutor() as pool:
            answers = [pool.submit(clients.ask, stream=True) for _ in range(2)]
            assert clients.begun.wait(20)
            time.sleep(0.2)
            (rank,) = _children(server.pid)
            server.kill()
            assert all(isinstance(answer.exception(), httpx.HTTPError) for answer in answers)
        deadline = time.monotonic() + 10
        while _runs(rank):
            assert time.monotonic() < deadline, "rank 1 is still there"
            time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether the process does; one that has ended may stay until somebody asks for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
