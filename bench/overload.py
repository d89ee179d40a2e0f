"""A queue of requests for many adapters, through the real scheduler: python bench/overload.py

All requests come at once, with zipf adapters; no model runs. A step takes as long as it would on a
GPU, by three numbers: a fixed part, a part for each token, and a part for each adapter in it. A step
that no graph serves takes `--launched-ms` at least. Loads come one after the other. Says what the
scheduler's choices cost: how many tokens a second come out, and how many were computed twice.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loramux.adapters.pool import AdapterPool
from loramux.bench.report import append_row, header, result_path, write_results
from loramux.engine.blocks import BlockPool
from loramux.engine.plan import Sampled, StepPlan, StepResult
from loramux.engine.scheduler import Scheduler, SchedulerLimits
from loramux.engine.sequence import Sequence as Answer
from loramux.types import AdapterRef, Request, SamplingParams


@dataclass(frozen=True, slots=True)
class Case:
    """The defaults are Llama-3.1-8B on one H100: a step of 1 token took 5.5 ms there, of 256 10.8."""

    requests: int = 512
    input_len: int = 512
    output_len: int = 128
    adapters: int = 1000  # 0: none are used
    zipf: float = 1.0
    max_loras: int = 64
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    blocks: int = 30_000
    patience_s: float = 2.0
    step_ms: float = 5.2
    token_ms: float = 0.0222
    adapter_ms: float = 0.02
    load_ms: float = 1.5
    largest_graph: int = 1024  # tokens of a step with prompts in it; 0: only decodes have graphs
    launched_ms: float = 60.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """`twice`: tokens computed over those that had to be."""

    tok_s: float
    ratio: float  # to the same without adapters
    steps: int
    loads: int
    preemptions: int
    twice: float


def simulate(case: Case) -> Row:
    """One queue, from the first step to the last token."""
    run = _Run(case)
    while run.scheduler.has_work or run.in_flight is not None:
        run.step()
    needed = case.requests * (case.input_len + case.output_len - 1)
    tok_s = case.requests * case.output_len / run.now
    counts = run.steps, run.loads, run.scheduler.preemptions
    return Row(round(tok_s, 1), 1.0, *counts, round(run.computed / needed, 3))


class _Run:
    """The step loop with one step ahead, on a clock of its own in seconds."""

    def __init__(self, case: Case):
        self.case = case
        limits = SchedulerLimits(case.max_num_seqs, case.max_num_batched_tokens, case.patience_s)
        pool = AdapterPool(case.max_loras, 16) if case.adapters else None
        self.scheduler = Scheduler(limits, BlockPool(case.blocks, 16), pool)
        self.now = 0.0
        self.steps = self.loads = self.computed = 0
        self.in_flight: tuple[StepPlan, float] | None = None
        self._device_free = self._loader_free = 0.0
        self._arriving: list[tuple[float, str]] = []
        for number, request in enumerate(_requests(case)):
            self.scheduler.add(Answer(number, request, 0, 0, queued_at=0.0))

    def step(self) -> None:
        for arrival in [a for a in self._arriving if a[0] <= self.now]:
            self._arriving.remove(arrival)
            self.scheduler.loaded(arrival[1])
        plan = self.scheduler.plan(self.now)
        for load in self.scheduler.take_loads():
            self.loads += 1
            self._loader_free = max(self.now, self._loader_free) + self.case.load_ms / 1000
            self._arriving.append((self._loader_free, load.ref.digest))
        launched = None
        if plan.rows:
            self._device_free = max(self.now, self._device_free) + _seconds(self.case, plan)
            self.scheduler.launched(plan)
            self.steps += 1
            self.computed += plan.num_tokens
            launched = plan, self._device_free
        due, self.in_flight = self.in_flight, launched
        if due is not None:
            self.now = max(self.now, due[1])
            self._commit(due[0])
        elif launched is None:
            self.now = min(arrival for arrival, _ in self._arriving)

    def _commit(self, plan: StepPlan) -> None:
        result = {row.sequence_id: Sampled(7) for row in plan.rows if row.sample is not None}
        for answer, _ in self.scheduler.commit(plan, StepResult(result)):
            if answer.num_output >= self.case.output_len:
                self.scheduler.finish(answer, "length")


def _requests(case: Case) -> list[Request]:
    dice = random.Random(case.seed)
    shares = list(itertools.accumulate((k + 1) ** -case.zipf for k in range(case.adapters)))
    params, requests = SamplingParams(max_tokens=case.output_len), []
    for number in range(case.requests):
        adapters: tuple[tuple[AdapterRef, float], ...] = ()
        if case.adapters:
            name = f"adapter-{dice.choices(range(case.adapters), cum_weights=shares)[0]}"
            adapters = ((AdapterRef(name, name, "", 16, 14 << 20), 1.0),)
        prompt = tuple(dice.randrange(3, 100_000) for _ in range(case.input_len))
        requests.append(Request(str(number), prompt, params, adapters))
    return requests


def _seconds(case: Case, plan: StepPlan) -> float:
    adapters = len({row.members for row in plan.rows} - {()})
    busy = case.step_ms + case.token_ms * plan.num_tokens + case.adapter_ms * adapters
    decodes = all(len(row.token_ids) == 1 for row in plan.rows)
    graph = decodes or plan.num_tokens <= case.largest_graph
    return (busy if graph else max(busy, case.launched_ms)) / 1000


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in asdict(Case()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--output", type=Path, help="folder or .jsonl file for the rows")
    given = vars(parser.parse_args(argv))
    output: Path | None = given.pop("output")
    case = Case(**given)
    base = simulate(replace(case, adapters=0))
    rows = {0: base}
    if case.adapters:
        row = simulate(case)
        rows[case.adapters] = replace(row, ratio=round(row.tok_s / base.tok_s, 3))
    out = Table(title=f"{case.requests} requests at once, {case.max_loras} places")
    for head in ("adapters", *asdict(base)):
        out.add_column(head, justify="right")
    for adapters, row in rows.items():
        out.add_row(str(adapters), *map(str, asdict(row).values()))
    Console().print(out)
    if output is not None:
        path = output if output.suffix == ".jsonl" else result_path(output, workload="overload")
        write_results(path, header({**asdict(case), "workload": "overload"}), [])
        for adapters, row in rows.items():
            append_row(path, {"adapters": adapters, **asdict(row)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
