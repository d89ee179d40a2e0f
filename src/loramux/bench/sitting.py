"""What the drivers on an engine or its kernels share: options, folders, workers, results.

decode.py, at_once.py, load.py, kernels.py     plan jobs, measure them in the worker, print a table
sitting.py                                     one sitting: its model, adapters, rows, progress
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.bench.case import LINEARS, model_config
from loramux.bench.geometry import GEOMETRIES, geometry, scratch_folder, write_model
from loramux.bench.jobs import Job, run_worker
from loramux.bench.linears import adapter_elements
from loramux.bench.process import BenchError
from loramux.bench.random_adapters import write_adapters
from loramux.bench.report import OURS, VLLM, append_row, header, result_path, write_results

if TYPE_CHECKING:
    from loramux.bench.ceilings import Ceilings, StepFloor

Commands = dict[str, list[str]]
Body = Callable[["Sitting"], None]
PEER = "vllm_gpu.py"


class Numbers(argparse.Action):
    """`--adapters 0,8` and `--adapters 0 8` alike."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        try:
            numbers = [int(word) for value in values for word in value.split(",") if word]
        except ValueError:
            parser.error(f"{option}: {' '.join(values)} are no numbers")
        if not numbers or min(numbers) < 0:
            parser.error(f"{option} needs numbers from 0")
        setattr(namespace, self.dest, sorted(set(numbers)))


def add_numbers(parser: Any, flag: str, default: list[int] | None, text: str) -> None:
    parser.add_argument(flag, nargs="+", action=Numbers, default=default, metavar="N", help=text)


def add_model(parser: Any) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="folder of a Llama-like model")
    which.add_argument(
        "--geometry",
        metavar="NAME",
        help=f"random weights of this shape: {', '.join(GEOMETRIES)}; NAME:4 has 4 layers",
    )


def add_output(parser: Any) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="a .jsonl file, or a folder to put <date>-<machine>-<workload>.jsonl into",
    )


def add_engine(parser: Any) -> None:
    """Options of every workload that starts an engine."""
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters (16)")
    parser.add_argument("--targets", nargs="+", default=list(LINEARS), choices=LINEARS)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="spread over N GPUs (1)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--settings", type=json.loads, default={}, metavar="JSON", help="more arguments of LLM"
    )
    parser.add_argument("--systems", nargs="+", help=f"from {OURS}, {VLLM}; default: all there")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="the repository's bench/peers")
    parser.add_argument(
        "--vllm-python", metavar="PATH", help="the interpreter of an environment with vLLM"
    )
    parser.add_argument(
        "--patience", type=float, default=600.0, metavar="SECONDS", help="longest life of a worker"
    )


@dataclass(slots=True)
class Sitting:
    """One run of a command: what is measured on, and the rows so far."""

    workload: str
    options: argparse.Namespace
    commands: Commands
    folder: Path
    head: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    ceilings: Ceilings | None = None
    path: Path | None = None
    started: float = field(default_factory=time.perf_counter)
    _adapters: dict[tuple[int, bool, tuple[str, ...]], list[str]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Raises ValueError for a model that is not there."""
        self.config = _config(self.options)
        if self.options.model is not None:
            self.model = str(Path(self.options.model).resolve())
        else:
            shape = geometry(self.options.geometry)
            self.model = str(write_model(self.folder / "model", shape))

    def say(self, text: str) -> None:
        """Progress, with the seconds since the start."""
        print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", file=sys.stderr, flush=True)

    def settings(self, max_num_seqs: int | None, max_model_len: int, **lora: Any) -> dict[str, Any]:
        """Keyword arguments of `LLM`; LoRA is enabled if `lora` has anything."""
        device = getattr(self.options, "device", "auto")
        return {
            "model": self.model,
            **({"load_format": "dummy"} if self.options.model is None else {}),
            **({"max_num_seqs": max_num_seqs} if max_num_seqs else {}),
            **({"device": device} if device != "auto" else {}),
            **self._ranks(),
            "max_model_len": max_model_len,
            **({"enable_lora": True, **lora} if lora else {}),
            **self.options.settings,
        }

    def _ranks(self) -> dict[str, int]:
        ranks = getattr(self.options, "tensor_parallel_size", 1)
        return {"tensor_parallel_size": ranks} if ranks > 1 else {}

    def adapters(self, count: int, rank: int, *, dora: bool = False) -> list[str]:
        """Folders of `count` adapters; those of the largest count serve every smaller one."""
        targets = tuple(self.options.targets)
        known = self._adapters.get((rank, dora, targets), [])
        if len(known) < count:
            self.say(f"writing {count} adapters of rank {rank}")
            place = self.folder / f"adapters-{rank}-{count}{'-dora' if dora else ''}"
            seed = self.options.seed
            paths = write_adapters(place, self.config, count, rank, targets, seed=seed, dora=dora)
            known = self._adapters[rank, dora, targets] = [str(path) for path in paths]
        return known[:count]

    def adapter_bytes(self, rank: int) -> int:
        return 2 * adapter_elements(self.config, rank, self.options.targets)

    def floor(self) -> StepFloor:
        from loramux.bench.ceilings import StepFloor

        assert self.ceilings is not None
        return StepFloor(self.config, self.ceilings, **self._ranks())

    def run(
        self,
        name: str,
        job: Job,
        finish: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row,
    ) -> None:
        """The job on every system; `finish` completes each row with what only the driver knows."""
        for system, command in self.commands.items():
            marks = {"system": system, **self._ranks(), **job.marks}
            ours = Job(**{**_fields(job), "marks": marks, "ceilings": self.ceilings is None})
            label, patience = f"{system}-{name}", self.options.patience
            for row in run_worker(command, ours, self.folder, label, patience, self.say):
                self.take(finish(row))

    def take(self, row: dict[str, Any]) -> None:
        if row["case"] == "ceilings":
            from loramux.bench.ceilings import Ceilings

            self.ceilings = Ceilings.from_row(row)
            self._open_results()
        self.rows.append(row)
        if self.path is not None:
            append_row(self.path, row)
        shown = {k: v for k, v in row.items() if not isinstance(v, (list, dict)) and v is not None}
        self.say(" ".join(f"{key}={value}" for key, value in shown.items()))

    def of(self, case: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["case"] == case]

    def _open_results(self) -> None:
        output = self.options.output
        if output is None:
            return
        assert self.ceilings is not None
        gpu = self.ceilings.gpu
        self.path = output if output.suffix == ".jsonl" else result_path(output, gpu, self.workload)
        if gpu:
            self.head["machine"]["gpu"] = gpu
        write_results(self.path, self.head, [])


def _fields(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in Job.__dataclass_fields__}


def sit(
    workload: str,
    options: argparse.Namespace,
    argv: Sequence[str],
    body: Body,
    *,
    num_bytes: int = 0,
    adapters: int | None = None,
    commands: Commands | None = None,
) -> int:
    """Run `body` in a sitting; the exit status. Its scratch folder has room for `num_bytes`, or for
    `adapters` adapters where these are larger. None: it needs no sizes of the model's layers."""
    head = header(_settings(workload, options, argv))  # now: the commit is that of the code
    try:
        chosen = commands or worker_commands(options)
        with scratch_folder(max(num_bytes, _bytes_of(adapters, options))) as scratch:
            sitting = Sitting(workload, options, chosen, Path(scratch), head)
            sitting.prepare()
            body(sitting)
    except (BenchError, ValueError) as error:
        print(f"loramux bench: {error}", file=sys.stderr)
        return 1
    if sitting.path is not None:
        sitting.say(f"results: {sitting.path}")
    return 0


def _config(options: argparse.Namespace) -> dict[str, Any]:
    """The `config.json` of what is measured. Raises ValueError for a model that is not there."""
    if options.model is not None:
        return model_config(str(Path(options.model).resolve()))
    return geometry(options.geometry).config


def _bytes_of(adapters: int | None, options: argparse.Namespace) -> int:
    """Raises ValueError for a model whose layers are not known: floors need them as well."""
    if adapters is None:
        return 0
    return 2 * adapters * adapter_elements(_config(options), options.rank, options.targets)


def worker_commands(options: argparse.Namespace) -> Commands:
    """System -> command of its worker. Raises ValueError for one that is not there."""
    commands = {OURS: [sys.executable, "-m", "loramux.bench.jobs"]}
    peers, python = getattr(options, "peers", None), getattr(options, "vllm_python", None)
    if peers is not None and python is not None:
        if not (peers / PEER).is_file():
            raise ValueError(f"--peers {peers} does not hold {PEER}")
        commands[VLLM] = [python, str(peers / PEER)]
    wanted = getattr(options, "systems", None) or list(commands)
    if missing := [system for system in wanted if system not in commands]:
        raise ValueError(
            f"--systems {' '.join(missing)}: not there (vllm needs --peers and --vllm-python)"
        )
    return {system: commands[system] for system in wanted}


def _settings(workload: str, options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """What was asked for, without the paths of this machine."""
    hidden = {"output", "peers", "vllm_python"}
    of_no_use = {"concurrency", "dtype", "quick"}  # options of throughput's other mode
    settings = {k: v for k, v in vars(options).items() if k not in hidden | of_no_use}
    words = list(argv)
    if options.model is not None:
        settings["model"] = Path(options.model).name
        words = [settings["model"] if word == options.model else word for word in words]
    for path in (getattr(options, name, None) for name in sorted(hidden)):
        if path is not None and Path(path).is_absolute():
            words = [Path(path).name if word == str(path) else word for word in words]
    return {**settings, "command": " ".join(["loramux", "bench", workload, *words])}


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table; plain lines in an environment without rich, as a peer's may be."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title, "  ".join(columns), *("  ".join(row) for row in rows), sep="\n")
        return
    table = Table(box=SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:  # into a file or a pipe: as wide as the table is
        console = Console(width=200)
    console.print(title, highlight=False)
    console.print(table)
