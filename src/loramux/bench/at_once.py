"""`loramux bench throughput --requests N`: N requests handed over at once, output tokens a second.

Requests take the adapters in turn, or by a zipf law. One engine without LoRA, one with; what is
cold besides the adapters (graphs, compiled kernels) is warmed up first with small requests.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loramux.bench.case import LINEARS
from loramux.bench.jobs import Job, Say
from loramux.bench.sitting import Commands, Sitting, show, sit
from loramux.bench.system import System

OPTIONS = (
    "requests",
    "zipf",
    "max_loras",
    "max_num_seqs",
    "exact",
    "targets",
    "device",
    "settings",
)
DEFAULT_LOADED = 64  # adapters on the device, unless --max-loras says otherwise
DEFAULT_BATCH = 256  # most sequences in a step, for the floor; the engine's own default
WARM_UP_OUTPUT = 32


@dataclass(frozen=True, slots=True)
class Work:
    """One request of a run."""

    prompt: list[int]
    output_len: int
    adapter: int | None


def add_options(group: Any) -> None:
    """What `loramux bench throughput` takes for this mode alone."""
    group.add_argument(
        "--requests", type=int, metavar="N", help="hand N requests to the engine at once"
    )
    group.add_argument(
        "--zipf",
        type=float,
        metavar="S",
        help="adapter k with probability ~ 1/k^S; without it they take turns",
    )
    group.add_argument(
        "--max-loras",
        type=int,
        metavar="N",
        help=f"default: the adapters, {DEFAULT_LOADED} at most",
    )
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="most requests in one step")
    group.add_argument("--targets", nargs="+", default=list(LINEARS), choices=LINEARS)
    group.add_argument("--device", default="auto")
    group.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="spread over N GPUs (1)"
    )
    group.add_argument(
        "--settings", type=json.loads, default={}, metavar="JSON", help="more arguments of LLM"
    )
    group.add_argument(
        "--exact",
        action="store_true",
        help="an engine with max_loras = N for every N of --adapters",
    )


def run(options: argparse.Namespace, argv: Sequence[str], commands: Commands | None = None) -> int:
    # As much as the largest of today's usual cases needs: 1,000 of 14 MB, or 64 of 84 MB.
    num_bytes = (14 << 20) * max(400, max(options.adapters))
    return sit(
        "throughput",
        options,
        argv,
        _body,
        num_bytes=num_bytes,
        adapters=max(options.adapters),
        commands=commands,
    )


def _body(sitting: Sitting) -> None:
    for name, job in jobs(sitting):
        sitting.run(name, job, lambda row: finish(sitting, row))
    show_table(sitting)


def jobs(sitting: Sitting) -> Iterator[tuple[str, Job]]:
    counts = sitting.options.adapters
    used = [n for n in counts if n]
    if 0 in counts:
        yield "lora-off", _job(sitting, [0])
    if sitting.options.exact:
        for n in used:
            yield f"adapters-{n}", _job(sitting, [n])
    elif used:
        yield f"adapters-{max(used)}", _job(sitting, used)


def _job(sitting: Sitting, counts: list[int]) -> Job:
    options = sitting.options
    most = max(counts)
    lora: dict[str, Any] = {}
    if most:
        loaded = options.max_loras or min(most, DEFAULT_LOADED)
        # Every adapter is kept ready on the host: what is measured is the engine, not the disk.
        host = max(most, loaded)
        lora = {"max_loras": loaded, "max_lora_rank": options.rank, "max_cpu_loras": host}
    marks = {"lora": "enabled", "rank": options.rank, **lora} if lora else {"lora": "off"}
    length = options.input_len + options.output_len
    names = ("requests", "input_len", "output_len", "zipf", "runs", "seed", "device")
    return Job(
        workload="throughput",
        settings=sitting.settings(options.max_num_seqs, length, **lora),
        cases=[{"adapters": n} for n in counts],
        config=sitting.config,
        adapters=sitting.adapters(most, options.rank) if most else [],
        options={name: getattr(options, name) for name in names},
        marks={**marks, "targets": list(options.targets)} if lora else marks,
    )


# --- in the worker -------------------------------------------------------------------------------


def measure(job: Job, system: System, say: Say) -> Iterator[dict[str, Any]]:
    options = job.options
    dice = random.Random(options["seed"])
    for number, case in enumerate(job.cases, 1):
        say(f"case {number} of {len(job.cases)}: {case['adapters']} adapters")
        drain(system, warm_up(job, case["adapters"], dice))
        runs = []
        first: list[float] = []
        for _ in range(options["runs"]):
            work = requests(job, case["adapters"], dice)
            seconds, ttft = drain(system, work)
            runs.append(sum(item.output_len for item in work) / seconds)
            first += ttft
        yield {
            "case": "throughput",
            "adapters": case["adapters"],
            "throughput_tok_s": round(statistics.median(runs), 1),
            "runs": [round(value, 1) for value in runs],
            "ttft_p50_ms": round(1000 * statistics.median(first), 1),
            **{name: options[name] for name in ("requests", "input_len", "output_len")},
            "zipf": options["zipf"] if case["adapters"] else None,
        }


def requests(job: Job, adapters: int, dice: random.Random) -> list[Work]:
    options = job.options
    return [
        Work(_prompt(job, options["input_len"], dice), options["output_len"], adapter)
        for adapter in assignment(adapters, options["requests"], options["zipf"], dice)
    ]


def warm_up(job: Job, adapters: int, dice: random.Random) -> list[Work]:
    """Small requests that end one by one, so that batches of many sizes come by, and a few of
    the full length. All have the case's adapters."""
    options = job.options
    choices = assignment(adapters, options["requests"], options["zipf"], dice)
    short = min(16, options["input_len"])
    most = min(WARM_UP_OUTPUT, options["output_len"])
    work = [Work(_prompt(job, short, dice), dice.randint(1, most), a) for a in choices]
    full = [Work(_prompt(job, options["input_len"], dice), 2, a) for a in choices[:32]]
    return work + full


def _prompt(job: Job, length: int, dice: random.Random) -> list[int]:
    return [dice.randrange(3, job.vocab_size) for _ in range(length)]


def assignment(
    adapters: int, count: int, zipf: float | None, dice: random.Random
) -> list[int | None]:
    """The adapter of each of `count` requests."""
    if not adapters:
        return [None] * count
    if zipf is None:
        return [i % adapters for i in range(count)]
    cumulated = list(itertools.accumulate((k + 1) ** -zipf for k in range(adapters)))
    return list(dice.choices(range(adapters), cum_weights=cumulated, k=count))


def drain(system: System, work: Sequence[Work]) -> tuple[float, list[float]]:
    """Hand everything over and step until all is answered: (seconds, seconds to first tokens)."""
    started = time.perf_counter()
    for i, item in enumerate(work):
        system.submit(f"request-{i}", item.prompt, item.output_len, item.adapter)
    remaining, tokens = len(work), 0
    first: dict[str, float] = {}
    while remaining:
        for news in system.step():
            tokens += news.num_tokens
            remaining -= news.finished
            if news.num_tokens and news.request_id not in first:
                first[news.request_id] = time.perf_counter() - started
    seconds = time.perf_counter() - started
    wanted = sum(item.output_len for item in work)
    if tokens != wanted:
        raise RuntimeError(f"{tokens} tokens came out instead of {wanted}")
    return seconds, list(first.values())


# --- the table -----------------------------------------------------------------------------------


def finish(sitting: Sitting, row: dict[str, Any]) -> dict[str, Any]:
    """Compare a row with the engine without LoRA, and with what the device's rates allow."""
    if row["case"] != "throughput":
        return row
    options = sitting.options
    batch = options.max_num_seqs or DEFAULT_BATCH
    distinct = min(row["adapters"], row.get("max_loras", 0), batch)
    floor = sitting.floor()
    decoding = min(batch, options.requests)
    ceiling = floor.throughput_tok_s(
        options.requests,
        options.input_len,
        options.output_len,
        batch,
        floor.adapter_bytes(options.rank, options.targets, decoding, distinct),
    )
    bases = [r for r in sitting.of("throughput") if r["adapters"] == 0]
    base = next((r for r in bases if r["system"] == row["system"]), None)
    compared = {}
    if base is not None and row["adapters"]:
        compared["ratio"] = round(row["throughput_tok_s"] / base["throughput_tok_s"], 4)
    return {**row, **compared, "ceiling_tok_s": round(ceiling, 1)}


def show_table(sitting: Sitting) -> None:
    options = sitting.options
    title = (
        f"{options.requests} requests at once, {options.input_len} in, {options.output_len} out; "
        f"output tokens/s, medians. {sitting.ceilings}"
    )
    columns = ["system", "LoRAs", "max_loras", "traffic", "tok/s", "of base", "TTFT ms"]
    columns += ["ceiling", "of ceiling"]
    show(title, columns, (_cells(row) for row in sitting.of("throughput")))


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["system"],
        str(row["adapters"]),
        str(row.get("max_loras", "off")),
        "" if not row["adapters"] else "in turn" if row["zipf"] is None else f"zipf {row['zipf']}",
        f"{row['throughput_tok_s']:.0f}",
        f"{row['ratio']:.3f}" if "ratio" in row else "",
        f"{row['ttft_p50_ms']:.0f}",
        f"{row['ceiling_tok_s']:.0f}",
        f"{row['throughput_tok_s'] / row['ceiling_tok_s']:.0%}",
    ]
