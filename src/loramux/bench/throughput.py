"""The driver of `loramux bench throughput`: all systems side by side in one sitting.

A machine drifts, so what is to be compared is run close together. For each concurrency the
workers of all systems and adapter counts are started, and then their runs take turns:

    run 1: loramux/0  transformers/0  loramux/1  peft/1  loramux/8  peft/8
    run 2: loramux/0  ...

One works while the others wait for their next line on stdin. Each is a process of its own, so
its peak memory is its own too.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loramux.bench.case import Case, make_adapter, model_config
from loramux.bench.process import BenchError, Worker
from loramux.bench.report import (
    OURS,
    PEFT,
    TRANSFORMERS,
    VLLM,
    Row,
    header,
    result_path,
    table,
    write_results,
)

PEERS = {
    PEFT: "peft_mixed.py",
    TRANSFORMERS: "transformers_generate.py",
    VLLM: "vllm_offline.py",
}


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    from rich.console import Console

    console = Console(stderr=True)
    head = header(_settings(options, argv))  # now: the commit is that of the code that runs
    try:
        commands = worker_commands(options)
        with tempfile.TemporaryDirectory(prefix="loramux-bench-") as scratch:
            rows = measure(options, commands, Path(scratch), console)
    except (BenchError, ValueError) as error:
        console.print(f"loramux bench: {error}", style="red", markup=False)
        return 1
    if options.output is not None:
        path = options.output if options.output.suffix == ".jsonl" else result_path(options.output)
        write_results(path, head, rows)
        console.print(f"results: {path}")
    out = Console()
    out.print(table(rows), width=None if out.is_terminal else 100)
    return 0


def _settings(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """What was asked for, without the paths of this machine."""
    settings = {
        key: value for key, value in vars(options).items() if key not in ("output", "peers")
    }
    model = settings["model"] = Path(options.model).name
    settings["vllm_python"] = options.vllm_python is not None
    hidden = {options.model: model, options.vllm_python: "PYTHON"}
    words = ["loramux", "bench", "throughput", *(hidden.get(word, word) for word in argv)]
    settings["command"] = " ".join(words)
    return settings


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="loramux bench throughput",
        description="Tokens/s, time to first token and peak memory on random prompts, greedy, "
        "EOS ignored, with random adapters on all seven linears.",
    )
    parser.add_argument("--model", required=True, help="folder of a Llama-like model")
    parser.add_argument("--concurrency", type=_numbers, default=[1, 8, 32], metavar="N,N,...")
    parser.add_argument("--adapters", type=_numbers, default=[0, 1, 8], metavar="N,N,...")
    parser.add_argument(
        "--systems",
        type=_words,
        default=None,
        metavar="NAME,NAME,...",
        help=f"from {OURS}, {', '.join(PEERS)}; default: all that are there",
    )
    parser.add_argument(
        "--peers",
        type=Path,
        default=None,
        metavar="DIR",
        help="the repository's bench/peers; without it loramux runs alone",
    )
    parser.add_argument(
        "--vllm-python",
        default=None,
        metavar="PATH",
        help="the interpreter of an environment that holds vLLM",
    )
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each case")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens")
    parser.add_argument("--output-len", type=int, default=64, help="output tokens")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--patience",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="the longest that one run may take",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="concurrency 8, 0 and 8 adapters, one run: a look, not a result",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        metavar="PATH",
        help="a .jsonl file, or a folder to put <date>-<machine>.jsonl into",
    )
    options = parser.parse_args(argv)
    if options.quick:
        options.concurrency, options.adapters, options.runs = [8], [0, 8], 1
    if options.runs < 1 or min(options.concurrency) < 1 or options.output_len < 1:
        parser.error("--runs, --concurrency and --output-len must be at least 1")
    return options


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _words(text: str) -> list[str]:
    return text.split(",")


def worker_commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """System → command that its worker starts with, for the systems asked for.

    Raises:
        ValueError: one was asked for that is unknown or whose script or interpreter is missing.
    """
    commands = {OURS: [sys.executable, "-m", "loramux.bench.ours"]}
    if options.peers is not None:
        for system, script in PEERS.items():
            python = options.vllm_python if system == VLLM else sys.executable
            if python is not None:
                commands[system] = [python, str(options.peers / script)]
                if not (options.peers / script).is_file():
                    raise ValueError(f"--peers {options.peers} does not hold {script}")
    wanted = options.systems or list(commands)
    missing = [system for system in wanted if system not in commands]
    if missing:
        raise ValueError(
            f"--systems {','.join(missing)}: not there (peers need --peers, vllm --vllm-python)"
        )
    return {system: commands[system] for system in wanted}


def takes(system: str, adapters: int) -> bool:
    """Whether a system has this case: PEFT without adapters is transformers, and the reverse."""
    return {PEFT: adapters > 0, TRANSFORMERS: adapters == 0}.get(system, True)


def measure(
    options: argparse.Namespace, commands: dict[str, list[str]], scratch: Path, console: Any
) -> list[Row]:
    config = model_config(options.model)
    folders = tuple(
        str(make_adapter(scratch / f"adapter-{i}", config, rank=options.rank, seed=i))
        for i in range(max(options.adapters))
    )
    rows: list[Row] = []
    for concurrency in options.concurrency:
        workers = []
        for adapters in options.adapters:
            case = Case(
                model=str(Path(options.model).resolve()),
                concurrency=concurrency,
                adapters=folders[:adapters],
                input_len=options.input_len,
                output_len=options.output_len,
                max_rank=options.rank,
                dtype=options.dtype,
                vocab_size=config["vocab_size"],
                seed=options.seed,
            )
            path = scratch / f"case-{concurrency}-{adapters}.json"
            case.write(path)
            for system, command in commands.items():
                if takes(system, adapters):
                    log = scratch / f"{system}-{concurrency}-{adapters}.log"
                    workers.append(
                        Worker(system, case, [*command, str(path)], log, options.patience)
                    )
        rows += take_turns(workers, options.runs, console)
    return rows


def take_turns(workers: list[Worker], runs: int, console: Any) -> list[Row]:
    """Start all workers, one after the other, and let their runs alternate."""
    with contextlib.ExitStack() as stack, console.status("") as status:
        load_s = []
        for worker in workers:
            status.update(f"loading: {worker.label}")
            stack.enter_context(worker)
            load_s.append(float(worker.answer()["load_s"]))
        for number in range(1, runs + 1):
            for worker in workers:
                status.update(f"run {number} of {runs}: {worker.label}")
                worker.run(number)
        rows = [worker.finish(seconds) for worker, seconds in zip(workers, load_s, strict=True)]
    for row in rows:
        console.print(
            f"{row.system}, concurrency {row.concurrency}, {row.adapters} adapters: "
            f"{row.tok_s:.1f} tok/s"
        )
    return rows
