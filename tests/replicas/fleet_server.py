"""`loramux serve` with replicas, as a process: its replicas, their metrics, their ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

PATIENCE_S = 300.0  # a replica is a process that imports torch, which takes a while on busy cores


class FleetServer:
    """Started at once; a context manager that ends it and all that it started."""

    def __init__(self, model: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "loramux", "serve", str(model), "--device", "cpu"]
        command += ["--served-model-name", "base", "--port", "0", "--kv-cache-memory", "32MiB"]
        self.process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("Listening on "), "the server ended before it listened"
        self.url = line.removeprefix("Listening on ").strip()
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(PATIENCE_S)

    def complete(self, **body: Any) -> httpx.Response:
        settings = {"model": "base", "prompt": "hey", "max_tokens": 2, "temperature": 0}
        return self.client.post("/v1/completions", json={**settings, **body})

    def samples(self, name: str) -> dict[tuple[str, ...], float]:
        """Values of one metric by (replica, further labels' values), summed over what is left."""
        found: dict[tuple[str, ...], float] = {}
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name:
                    labels = sample.labels
                    key = (labels["replica"], labels.get("adapter", ""))
                    found[key] = found.get(key, 0.0) + sample.value
        return found

    def num_replicas(self) -> int:
        return len(self.samples("loramux_engine_steps_total"))

    def pids(self, deployment: str) -> list[int]:
        """Processes of a deployment, among those that this server started."""
        mark = f":{deployment}".encode()
        return sorted(pid for pid in descendants(self.process.pid) if mark in command_of(pid))


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def descendants(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").glob("*/children"))
        children = [int(child) for path in tasks for child in path.read_text().split()]
    except OSError:
        return []
    return children + [further for child in children for further in descendants(child)]


def wait_until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
