"""The driver of `loramux bench throughput`: all systems side by side in one sitting.

With --requests it hands over to `at_once.py`; the rest of this is the comparison on a small model.

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

from loramux.bench import at_once
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
from loramux.bench.sitting import Commands, add_model, add_numbers, add_output

PEERS = {
    PEFT: "peft_mixed.py",
    TRANSFORMERS: "transformers_generate.py",
    VLLM: "vllm_offline.py",
}


def main(argv: Sequence[str], commands: Commands | None = None) -> int:
    options = parse(argv)
    if options.requests:
        return at_once.run(options, argv, commands)
    if commands is not None:
        print("loramux bench: this system is measured with --requests", file=sys.stderr)
        return 2
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
    # The other mode's options played no part.
    hidden_options = {"output", "peers", "geometry", *at_once.OPTIONS}
    settings = {key: value for key, value in vars(options).items() if key not in hidden_options}
    model = settings["model"] = Path(options.model).name
    settings["vllm_python"] = options.vllm_python is not None
    hidden = {options.model: model, options.vllm_python: "PYTHON"}
    words = ["loramux", "bench", "throughput", *(hidden.get(word, word) for word in argv)]
    settings["command"] = " ".join(words)
    return settings


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="loramux bench throughput",
        description="Tokens/s on random prompts, greedy, EOS ignored, with random adapters: of a "
        "small model beside transformers and PEFT, or (--requests) of many requests at once.",
    )
    add_model(parser)
    add_numbers(parser, "--adapters", None, "0 1 8; with --requests 0 8 32 64")
    parser.add_argument("--runs", type=int, help="timed runs of each case (3; with --requests 1)")
    parser.add_argument("--input-len", type=int, help="prompt tokens (128; with --requests 512)")
    parser.add_argument("--output-len", type=int, help="output tokens (64; with --requests 128)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters (16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--systems",
        nargs="+",
        action=Words,
        metavar="NAME",
        help=f"from {OURS}, {', '.join(PEERS)}; default: all that are there",
    )
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="DIR",
        help="the repository's bench/peers; without it loramux runs alone",
    )
    parser.add_argument(
        "--vllm-python",
        metavar="PATH",
        help="the interpreter of an environment that holds vLLM",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="the longest that one run may take; with --requests, one worker",
    )
    add_output(parser)
    beside = parser.add_argument_group("beside transformers and PEFT")
    add_numbers(beside, "--concurrency", [1, 8, 32], "requests at a time (1 8 32)")
    beside.add_argument("--dtype", default="bfloat16")
    beside.add_argument(
        "--quick",
        action="store_true",
        help="concurrency 8, 0 and 8 adapters, one run: a look, not a result",
    )
    at_once.add_options(parser.add_argument_group("many requests at once"))
    options = parser.parse_args(argv)
    _fill(options)
    if options.geometry and not options.requests:
        parser.error("--geometry needs --requests: the comparison takes a --model with weights")
    if options.runs < 1 or min(options.concurrency) < 1 or options.output_len < 1:
        parser.error("--runs, --concurrency and --output-len must be at least 1")
    return options


def _fill(options: argparse.Namespace) -> None:
    """Defaults that differ between the two modes."""
    at_once_defaults = {"adapters": [0, 8, 32, 64], "runs": 1, "input_len": 512, "output_len": 128}
    beside = {"adapters": [0, 1, 8], "runs": 3, "input_len": 128, "output_len": 64}
    if options.quick:
        options.concurrency, options.adapters, options.runs = [8], [0, 8], 1
    for name, value in (at_once_defaults if options.requests else beside).items():
        if getattr(options, name) is None:
            setattr(options, name, value)


class Words(argparse.Action):
    """`--systems a,b` and `--systems a b` alike."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, [w for value in values for w in value.split(",") if w])


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
