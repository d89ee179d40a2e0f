"""Small collectives among this machine's GPUs, by size: python bench/collectives.py

Sums and gathers as the layers of a step ask for them: through mailboxes in one round and in two, and
through NCCL. Microseconds of one, as the median of many replays of a graph that has several.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from loramux.bench.report import append_row, gpu_name, header, result_path, write_results
from loramux.parallel import Group, join

KILOBYTES = (4, 16, 64, 256, 512, 1024, 2048, 4096)
WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """`calls` stand in a graph, which is replayed `repeats` times."""

    ranks: int
    device: str = "cuda"
    calls: int = 32
    repeats: int = 20


@dataclass(frozen=True, slots=True)
class Sizes(Settings):
    """Of the tensors."""

    kilobytes: tuple[int, ...] = KILOBYTES


@dataclass(frozen=True, slots=True)
class Row:
    """Of bfloat16 tensors of so many kilobytes on each rank; None: no mailboxes take them."""

    kilobytes: int
    sum_nccl_us: float
    sum_one_round_us: float | None
    sum_two_rounds_us: float | None
    gather_nccl_us: float
    gather_us: float | None


Rows = Callable[[Any, Group, torch.device], Iterator[Any]]
"""Measures rows, dataclasses, together with the other ranks."""


def measure(settings: Settings, rows: Rows, tell: Callable[[Any], None]) -> None:
    """Tell each row as it is measured, on this process and `ranks - 1` more."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as folder:
        store = str(Path(folder) / "store")
        others = [
            context.Process(target=_be_rank, args=(settings, rank, store, rows), daemon=True)
            for rank in range(1, settings.ranks)
        ]
        for process in others:
            process.start()
        _be_rank(settings, 0, store, rows, tell)
        for process in others:
            process.join()


def _be_rank(
    settings: Settings, rank: int, store: str, rows: Rows, tell: Callable[[Any], None] | None = None
) -> None:
    on_gpu = settings.device == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    group = join(store, rank, settings.ranks, device, shared=False)
    with torch.inference_mode():
        for row in rows(settings, group, device):
            if tell is not None:
                tell(row)
    group.close()


def rows_of_sizes(settings: Sizes, group: Group, device: torch.device) -> Iterator[Row]:
    for kilobytes in settings.kilobytes:
        yield _row(settings, group, kilobytes, device)


def _row(settings: Settings, group: Group, kilobytes: int, device: torch.device) -> Row:
    # Sums are in place: with every call the numbers grow, to infinity before long.
    tensor = torch.randn(1, kilobytes * 512, device=device).bfloat16()  # [1, W]
    mailboxes = group.exchange

    def sums(rounds: int) -> float | None:
        if mailboxes is None or not mailboxes.takes(tensor, sums=True):
            return None
        with _in_rounds(rounds):
            return microseconds(settings, group, lambda: group.sum_parts(tensor))

    def gathers() -> float:
        return microseconds(settings, group, lambda: group.gather_runs(tensor[:, None], 512))

    takes = mailboxes is not None and mailboxes.takes(tensor, sums=False)
    one, two, gather = sums(1), sums(2), gathers() if takes else None
    group.exchange = None
    try:
        nccl = microseconds(settings, group, lambda: group.sum_parts(tensor))
        return Row(kilobytes, nccl, one, two, gathers(), gather)
    finally:
        group.exchange = mailboxes


@contextlib.contextmanager
def _in_rounds(rounds: int) -> Iterator[None]:
    from loramux.kernels import triton_exchange

    before = triton_exchange.ROUND_BYTES
    triton_exchange.ROUND_BYTES = -1 if rounds == 2 else 1 << 40
    try:
        yield
    finally:
        triton_exchange.ROUND_BYTES = before


def microseconds(settings: Settings, group: Group, call: Callable[[], Any]) -> float:
    """Of one `call`, which all ranks make."""
    for _ in range(WARM_UP):
        call()
    run = graph_of(settings, call)
    group.beside.all_reduce(torch.zeros(1))  # all begin together
    return round(statistics.median(run()) / settings.calls, 2)


def graph_of(settings: Settings, call: Callable[[], Any]) -> Callable[[], list[float]]:
    """What runs `call` so many times, again and again, and says how many microseconds each took."""
    if settings.device != "cuda":
        return lambda: [_clocked(settings, call) for _ in range(settings.repeats)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(settings.calls):
            call()

    def run() -> list[float]:
        # Nobody waits in between: ranks that started together would drift apart by more than the
        # collectives take.
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(settings.repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        marks[-1].synchronize()
        return [1000 * float(a.elapsed_time(b)) for a, b in itertools.pairwise(marks)]

    return run


def _clocked(settings: Settings, call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    for _ in range(settings.calls):
        call()
    return 1e6 * (time.perf_counter() - begin)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python bench/collectives.py")
    parser.add_argument("--kilobytes", type=int, nargs="+", default=list(KILOBYTES))
    return sit(
        parser,
        argv,
        "collectives",
        rows_of_sizes,
        Row,
        lambda options, ranks: Sizes(ranks, options.device, kilobytes=tuple(options.kilobytes)),
    )


def sit(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    name: str,
    rows: Rows,
    kind: type,
    settings_of: Callable[[argparse.Namespace, int], Settings],
) -> int:
    """Measure `rows` of that `kind` as the command line says, keep them and show them. `settings_of`
    makes settings of its options and the number of ranks."""
    parser.add_argument("--ranks", type=int, help="default: all GPUs, or 2 on a CPU")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    given = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(given)
    gpus = torch.cuda.device_count() if options.device == "cuda" else 2
    settings = settings_of(options, options.ranks or gpus)
    if settings.ranks < 2 or (options.device == "cuda" and settings.ranks > gpus):
        parser.error(f"{settings.ranks} ranks on {gpus} GPUs")
    gpu = gpu_name() if options.device == "cuda" else None
    path = options.output
    if path.suffix != ".jsonl":
        path = result_path(path, gpu, f"x{settings.ranks}-{name}")
    words = [word.replace(str(path), path.name) for word in given]
    command = " ".join([str(parser.prog), *words])
    write_results(path, header({**asdict(settings), "command": command}, gpu), [])
    table = Table(*kind.__dataclass_fields__, title=f"microseconds, {settings.ranks} ranks")  # type: ignore[attr-defined]
    measure(settings, rows, lambda row: _keep(row, path, table))
    Console().print(table)
    return 0


def _keep(row: Any, path: Path, table: Table) -> None:
    append_row(path, asdict(row))
    table.add_row(*("" if value is None else str(value) for value in asdict(row).values()))


if __name__ == "__main__":
    raise SystemExit(main())
