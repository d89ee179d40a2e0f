"""kill -9 or -STOP one rank under load: every open request hears of it, and the server leaves with an
error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tiny import TinyWorld


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]


HOWS = pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])


@HOWS
def test_a_lost_rank_ends_the_server(tiny_world: TinyWorld, how: signal.Signals) -> None:
    _lose_a_rank(tiny_world, how, "--device", "cpu")


@pytest.mark.multigpu
@HOWS
@pytest.mark.parametrize("eager", [["--enforce-eager"], []], ids=["eager", "graphs"])
def test_a_lost_rank_ends_the_server_under_nccl(
    tiny_world: TinyWorld, how: signal.Signals, eager: list[str]
) -> None:
    """Whose collectives do not notice: they wait on the device."""
    _lose_a_rank(tiny_world, how, "--device", "cuda", "--kv-cache-memory", "64MiB", *eager)


def _lose_a_rank(tiny_world: TinyWorld, how: signal.Signals, *more: str) -> None:
    model = str(tiny_world.model)
    flags = ["--port", "0", "--tensor-parallel-size", "2", "--rank-timeout-s", "3", *more]
    server = subprocess.Popen(
        [sys.executable, "-m", "loramux", "serve", model, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip().removeprefix("Listening on ")
        body = {"model": model, "prompt": "abc", "max_tokens": 240, "ignore_eos": True}

        def ask(stream: bool) -> httpx.Response:
            return httpx.post(f"{url}/v1/completions", json=body | {"stream": stream}, timeout=30)

        with ThreadPoolExecutor() as pool:
            answers = [pool.submit(ask, stream) for stream in (True, False, False)]
            time.sleep(0.5)
            begin = time.monotonic()
            (rank,) = _children(server.pid)
            os.kill(rank, how)
            streamed, *whole = (answer.result() for answer in answers)
        assert time.monotonic() - begin < 10
        assert '"code":"engine_stopped"' in streamed.text
        assert all(answer.status_code == 503 for answer in whole)
        _, errors = server.communicate(timeout=10)
        assert server.returncode not in (0, None) and "rank 1 of 2 is lost" in errors
        assert ("no sign of life for 3 s" in errors) == (how == signal.SIGSTOP)
        assert not Path(f"/proc/{rank}").exists()
    finally:
        server.kill()
        server.wait()
