"""The prefill part of `loramux bench decode`: how long the engine takes to read many prompt tokens.

`SEQUENCES` prompts of equal length come in at once and fill a step; the time is that from the first
one's arrival to the last one's first token, a step in which nothing else runs.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable
from typing import Any

from loramux.bench.jobs import Job
from loramux.bench.sitting import Sitting, show
from loramux.bench.system import System

SEQUENCES = 8
UNTIMED = 2  # what is compiled at first use, and its adapters brought in


def cases(tokens: int, counts: Iterable[int]) -> list[dict[str, Any]]:
    return [{"prefill": tokens, "adapters": n} for n in counts if tokens and n <= SEQUENCES]


def settings(tokens: int) -> dict[str, Any]:
    """Keyword arguments of `LLM` under which such a step is one step, and read anew each time."""
    if not tokens:
        return {}
    return {"max_num_batched_tokens": tokens, "enable_prefix_caching": False}


def measure_case(
    job: Job, system: System, case: dict[str, Any], dice: random.Random
) -> dict[str, Any]:
    for _ in range(UNTIMED):
        prefill_once(system, job, case, dice)
    times = [1000 * prefill_once(system, job, case, dice) for _ in range(job.options["repeats"])]
    return {
        "case": "prefill",
        "tokens": case["prefill"],
        "sequences": SEQUENCES,
        "adapters": case["adapters"],
        "prefill_ms": round(statistics.median(times), 3),
        "spread_ms": round(max(times) - min(times), 3),
        "repeats": len(times),
    }


def prefill_once(system: System, job: Job, case: dict[str, Any], dice: random.Random) -> float:
    """Seconds until every prompt has its first token."""
    length, adapters = case["prefill"] // SEQUENCES, case["adapters"]
    prompts = [[dice.randrange(3, job.vocab_size) for _ in range(length)] for _ in range(SEQUENCES)]
    started = time.perf_counter()
    for i, prompt in enumerate(prompts):
        system.submit(f"prefill-{i}", prompt, 1, i % adapters if adapters else None)
    remaining = SEQUENCES
    while remaining:
        remaining -= sum(item.finished for item in system.step())
    return time.perf_counter() - started


def finish(sitting: Sitting, row: dict[str, Any]) -> dict[str, Any]:
    """Compare a row with the engine without LoRA."""
    for base in sitting.of("prefill"):
        same = (base["system"], base["tokens"]) == (row["system"], row["tokens"])
        if same and base["lora"] == "off" and row["lora"] == "enabled":
            added = row["prefill_ms"] - base["prefill_ms"]
            ratio = row["prefill_ms"] / base["prefill_ms"]
            return {**row, "added_ms": round(added, 3), "ratio": round(ratio, 4)}
    return row


def show_table(sitting: Sitting) -> None:
    rows = sitting.of("prefill")
    if not rows:
        return
    columns = ["system", "tokens", "LoRAs", "max_loras", "rank/max", "ms", "spread", "ratio"]
    show(f"prefill, {SEQUENCES} prompts at once, medians", columns, map(_cells, rows))


def _cells(row: dict[str, Any]) -> list[str]:
    enabled = row["lora"] == "enabled"
    fully = " fully" if row.get("fully_sharded_loras") else ""
    return [
        row["system"],
        str(row["tokens"]),
        str(row["adapters"]),
        f"{row['max_loras']}{fully}" if enabled else "off",
        f"{row['rank']}/{row['max_lora_rank']}" if enabled else "",
        f"{row['prefill_ms']:.2f}",
        f"{row['spread_ms']:.2f}",
        f"{row['ratio']:.3f}" if "ratio" in row else "",
    ]
