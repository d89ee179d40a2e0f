"""A worker process, as the driver sees it: started, asked for runs, asked for its row."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from loramux.bench.case import Case
from loramux.bench.report import Row, make_row

SOURCE_ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """Of a worker: it sees this very source, and never looks for a hub."""
    paths = [str(SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


class BenchError(Exception):
    """A worker did not do what it was asked; the message carries the end of its log."""


@dataclass(slots=True)
class Worker:
    """A started worker process, seen as questions and answers."""

    system: str
    case: Case
    command: list[str]
    log: Path
    patience_s: float
    runs: list[dict[str, Any]] = field(default_factory=list)
    _process: subprocess.Popen[str] | None = None
    _log_file: IO[str] | None = None

    def __enter__(self) -> Self:
        self._log_file = self.log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            text=True,
            env=environment(),
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._log_file is not None:
            self._log_file.close()

    @property
    def label(self) -> str:
        case = self.case
        return f"{self.system}, concurrency {case.concurrency}, {len(case.adapters)} adapters"

    def run(self, number: int) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # answer() then says why it is gone
            self._process.stdin.write(f"{number}\n")
            self._process.stdin.flush()
        self.runs.append(self.answer())

    def finish(self, load_s: float) -> Row:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.close()
        peak = self.answer()["peak_rss_mib"]
        return make_row(
            self.system,
            concurrency=self.case.concurrency,
            adapters=len(self.case.adapters),
            runs=self.runs,
            load_s=load_s,
            peak_rss_mib=peak,
        )

    def answer(self) -> dict[str, Any]:
        """The worker's next line.

        Raises:
            BenchError: it ended, or took longer than `patience_s` and was killed.
        """
        assert self._process is not None and self._process.stdout is not None
        watchdog = threading.Timer(self.patience_s, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            status = self._process.wait()
            tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
            raise BenchError(f"{self.label}: ended with status {status}\n" + "\n".join(tail))
        content: dict[str, Any] = json.loads(line)
        return content
