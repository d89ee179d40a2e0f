"""The serving process at its end: requests finish or get an error, never silence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src"


class Process:
    def __init__(self, *arguments: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(SOURCE)}
        self.child = subprocess.Popen(
            [sys.executable, str(HERE / "fake_server.py"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.child.stdout is not None
        self.listening = self.child.stdout.readline().strip()
        self.example = self.child.stdout.readline().strip()
        self.url = self.listening.removeprefix("Listening on ")

    def complete(self, length: int, stream: bool = False) -> httpx.Response:
        """An answer of `length` tokens, 50 ms each."""
        body = {"model": "org/base", "prompt": "x" * length, "max_tokens": length}
        return httpx.post(f"{self.url}/v1/completions", json=body | {"stream": stream}, timeout=20)

    def end(self) -> tuple[int, str]:
        _, errors = self.child.communicate(timeout=15)
        return self.child.returncode, errors


@contextmanager
def process(*arguments: str) -> Iterator[Process]:
    started = Process(*arguments)
    try:
        yield started
    finally:
        started.child.kill()
        started.child.wait()


def test_running_requests_finish_after_sigterm() -> None:
    with process("10") as server, ThreadPoolExecutor() as pool:
        assert server.listening.startswith("Listening on http://127.0.0.1:")
        answers = [pool.submit(server.complete, 20, stream) for stream in (True, False)]
        time.sleep(0.4)
        server.child.send_signal(signal.SIGTERM)
        time.sleep(0.4)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
        streamed, whole = (answer.result() for answer in answers)
        assert whole.json()["choices"][0]["finish_reason"] == "length"
        assert '"finish_reason":"length"' in streamed.text and "[DONE]" in streamed.text
        code, errors = server.end()
        assert (code, errors) == (0, "")


@pytest.mark.parametrize("signals", [1, 2])
def test_what_cannot_finish_gets_an_error(signals: int) -> None:
    """After the timeout (0.3 s), or at once at the second signal."""
    with process("0.3" if signals == 1 else "60") as server, ThreadPoolExecutor() as pool:
        answers = [pool.submit(server.complete, 90, stream) for stream in (True, False)]
        time.sleep(0.5)
        begin = time.monotonic()
        for _ in range(signals):
            server.child.send_signal(signal.SIGINT)
            time.sleep(0.1)
        streamed, whole = (answer.result() for answer in answers)
        assert whole.status_code == 503
        assert streamed.text.rstrip().endswith("data: [DONE]")
        assert '"code":"engine_stopped"' in streamed.text
        code, errors = server.end()
        assert (code, errors) == (0, "")
        assert time.monotonic() - begin < 5


def test_a_dead_engine_ends_every_request_and_the_process() -> None:
    with process("10", "die") as server, ThreadPoolExecutor() as pool:
        answer = pool.submit(server.complete, 90)
        assert answer.result().status_code == 503
        code, errors = server.end()
        assert code != 0
        assert errors.splitlines()[-1].startswith("loramux: error: the engine has died")
        assert "the GPU is on fire" in errors


def test_the_printed_example_works() -> None:
    with process("1") as server:
        assert server.example.startswith("Try: curl ")
        done = subprocess.run(
            ["sh", "-c", server.example.removeprefix("Try: ")], capture_output=True, text=True
        )
        if done.returncode == 127:
            pytest.skip("curl is not installed")
        assert '"model":"alpha"' in done.stdout
