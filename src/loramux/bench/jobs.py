"""One engine, one process: a job as a JSON file, its worker, and the driver's view of it.

The driver starts a worker for every engine that a workload needs, one after the other, so that
each has the device to itself and starts cold. The worker writes a line of JSON for everything it
has to say: {"note": text}, {"row": {...}}. By hand:

    python -m loramux.bench.jobs job.json

Needs only the standard library until an engine is opened.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loramux.bench.process import BenchError, environment
from loramux.bench.system import System, open_ours
from loramux.bench.worker import take_stdout

EXIT_ALONE = 3  # the driver went without a word

Say = Callable[[str], None]
Measure = Callable[["Job", System, Say], Iterator[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker does: start an engine with `settings`, then measure `cases` with it."""

    workload: str
    settings: dict[str, Any]  # keyword arguments of `LLM`, ours and vLLM's alike
    cases: list[dict[str, Any]]
    config: dict[str, Any]  # the model's config.json
    adapters: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, Any] = field(default_factory=dict)  # what every row repeats
    ceilings: bool = False  # whether to measure the device first

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def measures() -> dict[str, Measure]:
    from loramux.bench.at_once import measure as throughput
    from loramux.bench.decode import measure as decode
    from loramux.bench.load import measure as load
    from loramux.bench.profile import measure as profile

    return {"decode": decode, "throughput": throughput, "load": load, "profile": profile}


def work(open_system: Callable[[dict[str, Any]], System], argv: Sequence[str]) -> int:
    """Be the worker of the job in `argv[0]`."""
    if len(argv) != 1:
        print("usage: <worker> JOB.json")
        return 2
    started = _process_start()
    threading.Thread(target=_leave_when_alone, name="bench-watch", daemon=True).start()
    replies = take_stdout()

    def reply(content: dict[str, Any]) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    job = Job.read(Path(argv[0]))
    for row in run(job, open_system, lambda text: reply({"note": text}), started):
        of_device = row["case"] == "ceilings"  # whatever the engine
        reply({"row": row if of_device else {**row, **job.marks}})
    return 0


def run(
    job: Job, open_system: Callable[[dict[str, Any]], System], say: Say, started: float
) -> Iterator[dict[str, Any]]:
    """The rows of a job; `started` is when the clock of the start-up time began."""
    if job.ceilings:
        from loramux.bench.ceilings import measure_ceilings, touch

        touch(job.options.get("device", "auto"))  # which the engine would have to do as well
        before = time.perf_counter()
        yield measure_ceilings(job.options.get("device", "auto")).as_row()
        started += time.perf_counter() - before  # no part of a start
    if job.workload == "kernels":
        from loramux.bench.kernels import measure as kernels

        yield from kernels(job, say)
        return
    say("starting the engine")
    opened = time.perf_counter()
    system = open_system(job.settings)
    try:
        ready = time.perf_counter()
        yield {
            "case": "start",
            "start_s": round(ready - started, 2),
            "engine_s": round(ready - opened, 2),
        }
        if job.adapters:
            say(f"registering {len(job.adapters)} adapters")
            system.register(job.adapters)
            seconds = time.perf_counter() - ready
            yield {"case": "register", "count": len(job.adapters), "register_s": round(seconds, 2)}
        yield from measures()[job.workload](job, system, say)
    finally:
        system.close()


def _leave_when_alone() -> None:
    """In a thread of its own: a driver holds this worker's input open, and writes nothing."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):  # else it was started by hand
        os.read(0, 1)
        os._exit(EXIT_ALONE)


def _process_start() -> float:
    """When this process began, on the clock of `perf_counter`: imports are part of a start."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, IndexError, ValueError):  # not Linux
        return time.perf_counter()
    age = max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
    return time.perf_counter() - age


def run_worker(
    command: list[str], job: Job, folder: Path, name: str, patience_s: float, say: Say
) -> Iterator[dict[str, Any]]:
    """Start a worker on `job` and yield its rows as they come.

    Raises:
        BenchError: it failed, or took longer than `patience_s`; with the end of its log.
    """
    path, log = folder / f"{name}.json", folder / f"{name}.log"
    job.write(path)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, str(path)],
            stdin=subprocess.PIPE,  # its end tells the worker that this process has gone
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=environment(),
        )
        watchdog = threading.Timer(patience_s, process.kill)
        watchdog.start()
        assert process.stdin is not None and process.stdout is not None
        try:
            for line in process.stdout:
                content = json.loads(line)
                if "note" in content:
                    say(f"{name}: {content['note']}")
                else:
                    yield content["row"]
            status = process.wait()
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()
            process.stdin.close()
    if status:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        raise BenchError(f"{name}: ended with status {status}\n" + "\n".join(tail))


if __name__ == "__main__":
    sys.exit(work(open_ours, sys.argv[1:]))
