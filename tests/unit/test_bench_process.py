"""The driver and its workers, with a worker that generates nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.console import Console

from loramux.bench.case import Case
from loramux.bench.process import BenchError, Worker
from loramux.bench.throughput import take_turns

HONEST = """
import sys
from loramux.bench.worker import Answer, serve

def load(case):
    print("noise on stdout")
    def generate(prompts, adapters, output_len):
        return Answer(len(prompts) * output_len, [0.001] * len(prompts))
    return generate

sys.exit(serve(load, sys.argv[1:]))
"""
BROKEN = "raise SystemExit('no such model')"
SILENT = "import time; time.sleep(60)"


def worker(tmp_path: Path, program: str, patience_s: float = 60.0) -> Worker:
    case = Case(model="m", concurrency=2, input_len=3, output_len=4)
    case.write(tmp_path / "case.json")
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "case.json")]
    return Worker("system", case, command, tmp_path / "log", patience_s)


def test_turns_end_in_one_row_each(tmp_path: Path) -> None:
    (row,) = take_turns([worker(tmp_path, HONEST)], 3, Console(quiet=True))
    assert (row.system, row.concurrency, row.runs) == ("system", 2, 3)
    assert row.peak_rss_mib > 1 and row.ttft_p50_ms == 1.0
    assert "noise on stdout" in (tmp_path / "log").read_text()


def test_a_worker_that_fails_is_reported_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="status 1\nno such model"):
        take_turns([worker(tmp_path, BROKEN)], 1, Console(quiet=True))


def test_a_worker_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="status -9"):
        take_turns([worker(tmp_path, SILENT, patience_s=0.5)], 1, Console(quiet=True))
