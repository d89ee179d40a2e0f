"""`loramux bench profile`: where the microseconds of a step go, kernel by kernel.

The engine decodes, or reads long prompts, under torch's profiler. What is shown is the time of each
kernel in one step and, as `(nothing runs)`, the time between kernels. On a CPU the operators stand
in for kernels. A profiled step is slower than one alone: compare with `loramux bench decode`.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from loramux.bench.jobs import Job, Say
from loramux.bench.sitting import (
    Commands,
    Sitting,
    add_engine,
    add_model,
    add_numbers,
    add_output,
    show,
    sit,
)
from loramux.bench.system import System

IDLE = "(nothing runs)"
Span = tuple[str, float, float]
"""A kernel's name, its start and its end in microseconds."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="loramux bench profile",
        description="Microseconds of every kernel in a decode step and in a prefill step.",
    )
    add_model(parser)
    add_numbers(parser, "--batches", [1, 64], "sequences that decode together")
    add_numbers(parser, "--adapters", [0, 1, 8, 32], "different adapters in the step")
    parser.add_argument("--prefill-tokens", type=int, default=8192, help="0: no prefill (8192)")
    parser.add_argument("--input-len", type=int, default=512, help="prompt tokens (512)")
    parser.add_argument("--decode-input-len", type=int, default=64, help="before decoding (64)")
    parser.add_argument("--steps", type=int, default=16, help="profiled steps of a case (16)")
    add_engine(parser)
    add_output(parser)
    options = parser.parse_args(argv)
    lengths = options.input_len, options.decode_input_len
    if min(*options.batches, *lengths, options.steps) < 1 or options.prefill_tokens < 0:
        parser.error(
            "--batches, --steps and both lengths must be at least 1, --prefill-tokens at least 0"
        )
    return options


def main(argv: Sequence[str], commands: Commands | None = None) -> int:
    options = parse(argv)
    return sit(
        "profile",
        options,
        argv,
        _body,
        num_bytes=6 << 30,
        adapters=max(options.adapters) or None,
        commands=commands,
    )


def _body(sitting: Sitting) -> None:
    sitting.run("profile", make_job(sitting))
    show_table(sitting)


def make_job(sitting: Sitting) -> Job:
    options = sitting.options
    most = max(options.adapters)
    lora = {"max_loras": most, "max_lora_rank": options.rank} if most else {}
    tokens = options.prefill_tokens
    kinds = [("decode", batch) for batch in options.batches] + (
        [("prefill", tokens)] * (tokens > 0)
    )
    sequences = max(*options.batches, -(-tokens // options.input_len), 1)
    length = max(options.input_len, options.decode_input_len) + 4 * options.steps + 16
    settings = sitting.settings(sequences, length, **lora)
    return Job(
        workload="profile",
        settings={**({"max_num_batched_tokens": tokens} if tokens else {}), **settings},
        cases=[
            {"step": kind, "tokens": tokens, "adapters": n}
            for kind, tokens in kinds
            for n in options.adapters
            if n <= tokens
        ],
        config=sitting.config,
        adapters=sitting.adapters(most, options.rank) if most else [],
        options={
            "input_len": options.input_len,
            "decode_input_len": options.decode_input_len,
            "steps": options.steps,
            "seed": options.seed,
            "device": options.device,
        },
        marks={"rank": options.rank, **lora},
    )


# --- in the worker -------------------------------------------------------------------------------


def measure(job: Job, system: System, say: Say) -> Iterator[dict[str, Any]]:
    dice = random.Random(job.options["seed"])
    for case in job.cases:
        say(f"{case['step']} of {case['tokens']} tokens, {case['adapters']} adapters")
        run = _decode if case["step"] == "decode" else _prefill
        _bring_in(job, system, case, dice)
        run(job, system, case, dice, 2)  # kernels are compiled
        spans, steps = run(job, system, case, dice, job.options["steps"])
        for name, microseconds, calls in by_kernel(spans):
            yield {
                **{"case": "profile", **case, "kernel": name},
                **{"us": round(microseconds / steps, 2), "calls": round(calls / steps, 2)},
            }


def _bring_in(job: Job, system: System, case: dict[str, Any], dice: random.Random) -> None:
    """Answer a request of each adapter: afterwards none is waited for."""
    remaining = case["adapters"]
    _submit(job, system, case, dice, remaining, 1, job.options["decode_input_len"])
    while remaining:
        remaining -= sum(news.finished for news in system.step())


def _decode(
    job: Job, system: System, case: dict[str, Any], dice: random.Random, steps: int
) -> tuple[list[Span], int]:
    """Spans of `steps` steps in which `tokens` sequences decode."""
    count = case["tokens"]
    _submit(job, system, case, dice, count, 4 * steps + 8, job.options["decode_input_len"])
    full, remaining = 0, count
    while full < 3:  # all prompts have been read
        news = system.step()
        full = full + 1 if len(news) == count else 0
        remaining -= sum(item.finished for item in news)
        if not remaining:
            raise RuntimeError(
                f"batch {count} never decoded as a whole: is the KV cache too small?"
            )
    with _Recorder(job.options["device"]) as recorder:
        for _ in range(steps):
            system.step()
    _abandon(system, count)
    return recorder.spans, steps


def _prefill(
    job: Job, system: System, case: dict[str, Any], dice: random.Random, steps: int
) -> tuple[list[Span], int]:
    """Spans of about `steps` / 4 steps of as many prompt tokens as fit."""
    rounds = max(1, steps // 4)
    count = rounds * max(1, case["tokens"] // job.options["input_len"])
    _submit(job, system, case, dice, count, 1, job.options["input_len"])
    remaining = count
    with _Recorder(job.options["device"]) as recorder:
        while remaining:
            remaining -= sum(news.finished for news in system.step())
    return recorder.spans, rounds


def _submit(
    job: Job,
    system: System,
    case: dict[str, Any],
    dice: random.Random,
    count: int,
    output_len: int,
    input_len: int,
) -> None:
    adapters = case["adapters"]
    for i in range(count):
        prompt = [dice.randrange(3, job.vocab_size) for _ in range(input_len)]
        system.submit(f"profile-{i}", prompt, output_len, i % adapters if adapters else None)


def _abandon(system: System, count: int) -> None:
    for i in range(count):
        system.cancel(f"profile-{i}")
    for _ in range(3):
        system.step()


class _Recorder:
    """torch's profiler around some steps."""

    def __init__(self, device: str):
        import torch

        self._torch = torch
        self._gpu = torch.cuda.is_available() and device != "cpu"
        kinds = torch.profiler.ProfilerActivity
        self._profiler = torch.profiler.profile(activities=[kinds.CUDA if self._gpu else kinds.CPU])
        self.spans: list[Span] = []

    def __enter__(self) -> _Recorder:
        self._wait()
        self._profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._wait()
        self._profiler.__exit__(*error)
        wanted = "CUDA" if self._gpu else None
        for event in self._profiler.events() or ():
            if wanted is None or event.device_type.name == wanted:
                self.spans.append((event.name, event.time_range.start, event.time_range.end))

    def _wait(self) -> None:
        if self._gpu:
            self._torch.cuda.synchronize()


def by_kernel(spans: Iterable[Span]) -> list[tuple[str, float, int]]:
    """(name, microseconds, calls) of each kernel, the longest first; `IDLE` for what lies between.

    Where kernels overlap, each moment counts for the one that started last."""
    ordered = sorted(spans, key=lambda span: span[1])
    totals: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for (name, start, end), following in zip(ordered, [*ordered[1:], None], strict=True):
        limit = end if following is None else min(end, following[1])
        totals[short(name)] += max(0.0, limit - start)
        calls[short(name)] += 1
        if following is not None and following[1] > end:
            totals[IDLE] += following[1] - end
            calls[IDLE] += 1
    found = [(name, total, calls[name]) for name, total in totals.items()]
    return sorted(found, key=lambda item: -item[1])


def short(name: str) -> str:
    """A kernel's name without its template's arguments."""
    name = re.sub(r"^(void|static|at::native::|\(anonymous namespace\)::)\s*", "", name)
    name = re.split(r"[<(]", name.replace("(anonymous namespace)", "anonymous"), maxsplit=1)[0]
    return name.strip()[-60:] or "?"


# --- the table -----------------------------------------------------------------------------------


def show_table(sitting: Sitting) -> None:
    rows = sitting.of("profile")
    cases = list(dict.fromkeys((row["step"], row["tokens"], row["adapters"]) for row in rows))
    cells = {(row["kernel"], (row["step"], row["tokens"], row["adapters"])): row for row in rows}
    names = list(dict.fromkeys(row["kernel"] for row in rows))
    names.sort(key=lambda name: -max(_us(cells.get((name, case))) for case in cases))
    lines = [
        [name, *(_cell(cells.get((name, case))) for case in cases)]
        for name in names
        if max(_us(cells.get((name, case))) for case in cases) >= 10.0
    ]
    total = [sum(_us(cells.get((name, case))) for name in names) for case in cases]
    lines.append(["all", *(f"{value:.0f}" for value in total)])
    columns = ["kernel", *(f"{kind} {tokens}, {n} LoRAs" for kind, tokens, n in cases)]
    show(f"µs a step (calls). {sitting.ceilings}", columns, lines)


def _us(row: dict[str, Any] | None) -> float:
    return 0.0 if row is None else float(row["us"])


def _cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['us']:.0f} ({row['calls']:g})"
