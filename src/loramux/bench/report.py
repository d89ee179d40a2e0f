"""Rows of results: their medians, what stands at the head of a file, and the table to read."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

OURS, PEFT, TRANSFORMERS, VLLM = "loramux", "peft", "transformers", "vllm"
PACKAGES = (
    *("loramux", "torch", "transformers", "peft", "tokenizers", "safetensors"),
    *("triton", "flashinfer-python", "vllm"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One system on one case: medians over `runs` runs, and every run's tokens/s."""

    system: str
    concurrency: int
    adapters: int
    tok_s: float
    ttft_p50_ms: float
    peak_rss_mib: float
    load_s: float
    runs: int
    tok_s_runs: list[float]


def make_row(
    system: str,
    *,
    concurrency: int,
    adapters: int,
    runs: list[dict[str, Any]],
    load_s: float,
    peak_rss_mib: float,
) -> Row:
    """The medians of `runs`, as `worker.one_run` reports them."""
    tok_s = [float(run["tok_s"]) for run in runs]
    first = [seconds for run in runs for seconds in run["ttft_s"]]
    return Row(
        system=system,
        concurrency=concurrency,
        adapters=adapters,
        tok_s=round(statistics.median(tok_s), 2),
        ttft_p50_ms=round(1000 * statistics.median(first), 1),
        peak_rss_mib=round(peak_rss_mib, 1),
        load_s=round(load_s, 2),
        runs=len(runs),
        tok_s_runs=[round(value, 2) for value in tok_s],
    )


def header(settings: dict[str, Any], gpu: str | None = None) -> dict[str, Any]:
    """What one must know to read the rows again: machine, versions, commit, settings."""
    return {
        "kind": "header",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            **({"gpu": gpu} if gpu else {}),
            "cpu": cpu_model(),
            "cores": usable_cores(),
            "memory_gib": memory_gib(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        "commit": commit(),
        "settings": settings,
    }


def write_results(path: Path, head: dict[str, Any], rows: list[Row]) -> None:
    lines = [head, *({"kind": "row", **asdict(row)} for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def keep_rows(
    rows: Iterable[dict[str, Any]], workload: str, options: Namespace, argv: Sequence[str]
) -> None:
    """Print each row as it comes, and keep it in `options.output`, if that is given, behind a header
    with the command and without the paths of this machine."""
    path: Path | None = options.output
    if path is not None:
        words = [word.replace(str(path), path.name) for word in argv]
        settings = {name: value for name, value in vars(options).items() if name != "output"}
        settings["command"] = " ".join(["loramux", "bench", workload, *words])
        content = json.dumps(header(settings, gpu_name())) + "\n"
        path.write_text(content, encoding="utf-8")
    for row in rows:
        print(json.dumps(row), flush=True)
        if path is not None:
            append_row(path, row)


def gpu_name() -> str | None:
    """Of the GPU that an engine takes first; None without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def append_row(path: Path, row: dict[str, Any]) -> None:
    """One more row: what was measured is kept, whatever becomes of the cases after it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "row", **row}) + "\n")


def result_path(folder: Path, gpu: str | None = None, workload: str | None = None) -> Path:
    """`<date>-<machine>[-<workload>].jsonl` in `folder`, with a counter where that is taken."""
    words = re.sub(r"\(.*?\)|processor|cpu|@.*", " ", (gpu or cpu_model()).lower())
    machine = "-".join(re.findall(r"[a-z0-9]+", words)) or "unknown"
    cores = "" if gpu else f"-{usable_cores()}-cores"
    stem = f"{datetime.now(UTC):%Y-%m-%d}-{machine}{cores}{f'-{workload}' if workload else ''}"
    path, count = folder / f"{stem}.jsonl", 1
    while path.exists():
        count += 1
        path = folder / f"{stem}.{count}.jsonl"
    return path


def table(rows: list[Row]) -> Table:
    """All rows, with two ratios.

    `ours`: loramux's tokens/s over this system's, on the same case. `tax`: what adapters cost a
    system; PEFT without adapters is transformers.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    out = Table(
        box=SIMPLE_HEAD,
        title="medians; users are concurrent requests, TTFT is p50, MiB is peak memory",
        title_justify="left",
    )
    for name in ("users", "LoRAs", "system", "tok/s", "TTFT ms", "MiB", "ours", "tax"):
        out.add_column(name, justify="left" if name == "system" else "right", no_wrap=True)
    by_case = {(row.system, row.concurrency, row.adapters): row for row in rows}
    last = None
    for row in sorted(rows, key=lambda r: (r.concurrency, r.adapters, r.system != OURS, r.system)):
        if last is not None and last != row.concurrency:
            out.add_section()
        last = row.concurrency
        out.add_row(
            str(row.concurrency),
            str(row.adapters),
            f"[bold]{row.system}[/bold]" if row.system == OURS else row.system,
            f"{row.tok_s:.1f}",
            f"{row.ttft_p50_ms:.0f}",
            f"{row.peak_rss_mib:.0f}",
            _against_peer(row, by_case),
            _tax(row, by_case),
        )
    return out


def _against_peer(row: Row, by_case: dict[tuple[str, int, int], Row]) -> str:
    ours = by_case.get((OURS, row.concurrency, row.adapters))
    return "" if ours is None or row.system == OURS else f"{ours.tok_s / row.tok_s:.2f} x"


def _tax(row: Row, by_case: dict[tuple[str, int, int], Row]) -> str:
    """What adapters cost a system: 1 - its tokens/s with them over those without."""
    base_system = TRANSFORMERS if row.system == PEFT else row.system
    base = by_case.get((base_system, row.concurrency, 0))
    return "" if base is None or row.adapters == 0 else f"{1 - row.tok_s / base.tok_s:.0%}"


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Commit of the checkout that this file is part of, marked where the tree has changes."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError:  # no git here
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    return f"{head}+changes" if head and git("status", "--porcelain") else head
