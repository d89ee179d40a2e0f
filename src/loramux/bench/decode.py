"""`loramux bench decode`: how long a decode step takes, by batch size and adapters in the batch.

One engine without LoRA and one with; each case runs `--repeats` times, and only steps in which
the whole batch decodes count. A step's time is that between two returns of `step()`: with
overlapped steps what returns is of the step before, and the pace is the same.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from loramux.bench import prefill
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
from loramux.bench.system import Chosen, System

WARM_UP_TOKENS = 8
RANK_BATCHES = (8, 64)  # where --ranks compares, as far as they are among --batches
RANK_ADAPTERS = 8


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="loramux bench decode",
        description="Milliseconds of a decode step, greedy, EOS ignored, random prompts and adapters.",
    )
    add_model(parser)
    add_numbers(parser, "--batches", [1, 8, 64, 256], "sequences that decode together")
    add_numbers(parser, "--adapters", [0, 1, 8, 32, 64], "different adapters in the batch")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of a case (3)")
    parser.add_argument("--input-len", type=int, default=64, help="prompt tokens (64)")
    parser.add_argument("--output-len", type=int, default=128, help="output tokens (128)")
    parser.add_argument(
        "--prefill-tokens",
        type=int,
        default=0,
        metavar="N",
        help=f"also: {prefill.SEQUENCES} prompts of N tokens in all, read at once",
    )
    parser.add_argument("--max-lora-rank", type=int, help="default: --rank")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="an engine with max_loras = N for every N of --adapters",
    )
    parser.add_argument(
        "--fully-sharded-loras",
        action="store_true",
        help="also: every engine with adapters once more with fully_sharded_loras",
    )
    parser.add_argument(
        "--ranks",
        nargs="?",
        const="8:16,8:64",
        metavar="R:MAX,...",
        help="also: adapters of rank R under max_lora_rank MAX, an engine each (8:16,8:64)",
    )
    parser.add_argument(
        "--dora", action="store_true", help="also: the engine of most adapters with DoRA adapters"
    )
    parser.add_argument(
        "--sums",
        action="store_true",
        help="also: every request under the sum of two of the adapters, of loramux alone",
    )
    add_engine(parser)
    add_output(parser)
    options = parser.parse_args(argv)
    if options.repeats < 1 or min(options.batches) < 1 or options.output_len < 4:
        parser.error("--repeats and --batches must be at least 1, --output-len 4")
    if 0 != options.prefill_tokens < prefill.SEQUENCES:
        parser.error(f"--prefill-tokens must be at least {prefill.SEQUENCES}")
    if options.fully_sharded_loras and options.tensor_parallel_size < 2:
        parser.error("--fully-sharded-loras needs --tensor-parallel-size 2 or more")
    try:
        options.ranks = _pairs(options.ranks)
    except ValueError:
        parser.error("--ranks wants R:MAX,R:MAX")
    return options


def _pairs(text: str | None) -> list[tuple[int, int]]:
    words = [word.split(":") for word in (text or "").split(",") if word]
    return [(int(rank), int(largest)) for rank, largest in words]


def main(argv: Sequence[str], commands: Commands | None = None) -> int:
    options = parse(argv)
    return sit(
        "decode",
        options,
        argv,
        _body,
        num_bytes=6 << 30,
        adapters=max(options.adapters),
        commands=commands,
    )


def _body(sitting: Sitting) -> None:
    for name, job in jobs(sitting):
        sitting.run(name, job, lambda row: finish(sitting, row))
    show_table(sitting)
    prefill.show_table(sitting)


def jobs(sitting: Sitting) -> Iterator[tuple[str, Job]]:
    """The engines, the one without LoRA first: the others' rows are compared with its."""
    for name, job in _jobs(sitting):
        yield name, job
        if sitting.options.fully_sharded_loras and job.adapters:
            fully = {"fully_sharded_loras": True}
            settings, marks = {**job.settings, **fully}, {**job.marks, **fully}
            yield f"{name}-fully", replace(job, settings=settings, marks=marks)


def _jobs(sitting: Sitting) -> Iterator[tuple[str, Job]]:
    options = sitting.options
    batches = options.batches
    most = max(options.adapters)
    if 0 in options.adapters:
        yield "lora-off", _job(sitting, 0, options.rank, 0, [(batch, 0) for batch in batches])
    largest = options.max_lora_rank or options.rank
    engines = [n for n in options.adapters if n] if options.exact else [most] if most else []
    for max_loras in engines:
        counts = [0, max_loras] if options.exact else options.adapters
        cases = [(b, n) for b in batches for n in counts if n <= b and n in options.adapters]
        if cases:
            yield f"max-loras-{max_loras}", _job(sitting, max_loras, options.rank, largest, cases)
    if options.dora and most:
        cases = [(b, n) for b in batches for n in options.adapters if 0 < n <= b]
        yield f"max-loras-{most}-dora", _job(sitting, most, options.rank, largest, cases, dora=True)
    for rank, under in options.ranks:
        chosen = [b for b in batches if b in RANK_BATCHES] or batches[-1:]
        cases = [(b, min(b, RANK_ADAPTERS)) for b in chosen]
        yield f"rank-{rank}-under-{under}", _job(sitting, RANK_ADAPTERS, rank, under, cases)


def _job(
    sitting: Sitting,
    max_loras: int,
    rank: int,
    largest: int,
    cases: list[tuple[int, int]],
    *,
    dora: bool = False,
) -> Job:
    options = sitting.options
    count = max(n for _, n in cases)
    lora = {"max_loras": max_loras, "max_lora_rank": largest} if max_loras else {}
    tokens = options.prefill_tokens
    length = max(options.input_len + options.output_len, tokens // prefill.SEQUENCES + 1)
    sequences = max(prefill.SEQUENCES * (tokens > 0), *(batch for batch, _ in cases))
    summed = options.sums and not dora
    marks = {"lora": "enabled", "rank": rank, **lora} if lora else {"lora": "off"}
    marks = {**marks, **({"dora": True} if dora else {})}
    return Job(
        workload="decode",
        settings={**prefill.settings(tokens), **sitting.settings(sequences, length, **lora)},
        cases=[
            *({"batch": batch, "adapters": n} for batch, n in cases),
            *({"batch": b, "adapters": n, "members": 2} for b, n in cases if n > 1 and summed),
            *prefill.cases(tokens, dict.fromkeys(n for _, n in cases)),
        ],
        config=sitting.config,
        adapters=sitting.adapters(count, rank, dora=dora) if count else [],
        options={
            "repeats": options.repeats,
            "input_len": options.input_len,
            "output_len": options.output_len,
            "seed": options.seed,
            "device": options.device,
        },
        marks=marks,
    )


# --- in the worker -------------------------------------------------------------------------------


def measure(job: Job, system: System, say: Say) -> Iterator[dict[str, Any]]:
    dice = random.Random(job.options["seed"])
    length, repeats = job.options["output_len"], job.options["repeats"]
    for number, case in enumerate(job.cases, 1):
        if "prefill" in case:
            say(f"case {number} of {len(job.cases)}: prefill, {case['adapters']} adapters")
            yield prefill.measure_case(job, system, case, dice)
            continue
        batch, adapters = case["batch"], case["adapters"]
        summed = {"members": case["members"]} if "members" in case else {}
        said = f"{adapters} adapters{', in sums' if summed else ''}"
        say(f"case {number} of {len(job.cases)}: batch {batch}, {said}")
        # Graphs of this shape are captured and its adapters brought in before anything counts.
        decode_once(system, job, case, min(WARM_UP_TOKENS, length), dice)
        runs = [decode_once(system, job, case, length, dice) for _ in range(repeats)]
        if not all(runs):
            raise RuntimeError(
                f"batch {batch} never decoded as a whole: is the KV cache too small?"
            )
        medians = [1000 * statistics.median(run) for run in runs]
        steps = sorted(1000 * step for run in runs for step in run)
        yield {
            "case": "decode",
            "batch": batch,
            "adapters": adapters,
            **summed,
            "decode_ms": round(statistics.median(medians), 4),
            "spread_ms": round(max(medians) - min(medians), 4),
            "p95_ms": round(steps[int(0.95 * (len(steps) - 1))], 4),
            "steps": len(steps),
            "repeats": repeats,
        }


def decode_once(
    system: System, job: Job, case: dict[str, Any], output_len: int, dice: random.Random
) -> list[float]:
    """Seconds of every step between two that brought a token for each sequence."""
    batch, adapters = case["batch"], case["adapters"]
    for i in range(batch):
        prompt = [dice.randrange(3, job.vocab_size) for _ in range(job.options["input_len"])]
        chosen: Chosen = i % adapters if adapters else None
        if members := case.get("members"):
            chosen = tuple((i + more) % adapters for more in range(members))
        system.submit(f"decode-{i}", prompt, output_len, chosen)
    remaining, steady = batch, []
    before, was_full = 0.0, False
    while remaining:
        news = system.step()
        now = time.perf_counter()
        is_full = sum(item.num_tokens == 1 for item in news) == batch
        if is_full and was_full:
            steady.append(now - before)
        # A call that brings nothing at all belongs to the step that is still running.
        if news:
            before, was_full = now, is_full
        remaining -= sum(item.finished for item in news)
    return steady


# --- the table -----------------------------------------------------------------------------------


def finish(sitting: Sitting, row: dict[str, Any]) -> dict[str, Any]:
    """Compare a row with the same batch without LoRA, and with its floor."""
    if row["case"] == "prefill":
        return prefill.finish(sitting, row)
    if row["case"] != "decode":
        return row
    options = sitting.options
    base = base_of(sitting.of("decode"), row)
    rank = row.get("rank", options.rank)
    context = options.input_len + options.output_len / 2
    floor = sitting.floor()
    adapter_bytes = floor.adapter_bytes(rank, options.targets, row["batch"], row["adapters"])
    floor_ms = floor.decode_ms(row["batch"], context, adapter_bytes)
    bare_ms = floor.decode_ms(row["batch"], context, 0)
    compared = {}
    if base is not None and row["lora"] == "enabled":
        added = row["decode_ms"] - base["decode_ms"]
        ratio = row["decode_ms"] / base["decode_ms"]
        compared = {"added_ms": round(added, 4), "ratio": round(ratio, 4)}
    floors = {"floor_ms": round(floor_ms, 4), "floor_added_ms": round(floor_ms - bare_ms, 4)}
    return {**row, **compared, **floors}


def base_of(rows: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any] | None:
    """The same system and batch on the engine without LoRA."""
    for other in rows:
        same = (other["system"], other["batch"]) == (row["system"], row["batch"])
        if same and other["lora"] == "off":
            return other
    return None


def show_table(sitting: Sitting) -> None:
    title = f"decode step, medians. {sitting.ceilings}"
    columns = [
        "system",
        "batch",
        "LoRAs",
        "max_loras",
        "rank/max",
        "ms",
        "spread",
        "added",
        "ratio",
    ]
    columns += ["floor", "floor added", "x floor"]
    show(title, columns, (_cells(row) for row in sitting.of("decode")))


def _kind(row: dict[str, Any]) -> str:
    kinds = {"fully_sharded_loras": " fully", "dora": " DoRA"}
    return str(row["max_loras"]) + "".join(word for key, word in kinds.items() if row.get(key))


def _cells(row: dict[str, Any]) -> list[str]:
    enabled = row["lora"] == "enabled"
    added = f"{row['added_ms']:+.3f}" if "added_ms" in row else ""
    return [
        row["system"],
        str(row["batch"]),
        f"{row['adapters']}{' in twos' if 'members' in row else ''}",
        _kind(row) if enabled else "off",
        f"{row['rank']}/{row['max_lora_rank']}" if enabled else "",
        f"{row['decode_ms']:.3f}",
        f"{row['spread_ms']:.3f}",
        added,
        f"{row['ratio']:.3f}" if "ratio" in row else "",
        f"{row['floor_ms']:.3f}",
        f"{row['floor_added_ms']:+.3f}" if row["adapters"] else "",
        f"{row['decode_ms'] / row['floor_ms']:.2f}",
    ]
