"""`loramux bench kernels`: the pieces of a layer's linears, each alone, at a model's sizes.

A piece is timed as it runs, behind a base product that has just swept the caches: what is
reported is the sequence with it less the sequence without it. Several sets of weights take
turns, and on a GPU a sequence is one captured graph.

    gemm              the base product
    gemm+A            the base product with the adapters' A rows under the weight
    shrink, expand    kernels of their own, shrink from the pool
    expand(A)         an expand kernel behind gemm+A
    fold              RoPE + KV write, the gated activation or the residual's norm
    fold+expand       the same with the expand in it, behind gemm+A; (pool): behind a shrink
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from loramux.bench.case import linear_shapes
from loramux.bench.jobs import Job, Say
from loramux.bench.linears import adapter_elements
from loramux.bench.sitting import (
    Commands,
    Sitting,
    add_model,
    add_numbers,
    add_output,
    show,
    sit,
)

if TYPE_CHECKING:
    from loramux.bench.kernel_set import KernelSet

MERGED = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
# Name -> (what is timed, what is taken off again); words are pieces of `KernelSet`.
PLAIN = {"gemm": (("gemm",), ()), "fold": (("gemm", "fold"), ("gemm",))}
WITH_LORA = {
    "gemm+A": (("gemm_a",), ()),
    "shrink": (("gemm", "shrink"), ("gemm",)),
    "expand": (("gemm", "shrink", "expand"), ("gemm", "shrink")),
    "expand(A)": (("gemm_a", "expand_a"), ("gemm_a",)),
    "fold+expand": (("gemm_a", "fold_expand"), ("gemm_a",)),
    "fold+expand(pool)": (("gemm", "shrink", "fold_pool"), ("gemm", "shrink")),
}
# What LoRA adds to a linear and the kernel behind it, in the ways to compute it.
WAYS = {
    "in the product, folded": (("gemm_a", "fold_expand"), ("gemm", "fold")),
    "in the product, expand kernel": (("gemm_a", "expand_a", "fold"), ("gemm", "fold")),
    "from the pool, folded": (("gemm", "shrink", "fold_pool"), ("gemm", "fold")),
    "from the pool, expand kernel": (("gemm", "shrink", "expand", "fold"), ("gemm", "fold")),
}
ROTATED_BYTES = 512 << 20  # together more than any cache
MOST_SETS = 8


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="loramux bench kernels",
        description="Microseconds of the pieces of a decode layer's linears, with and without LoRA.",
    )
    add_model(parser)
    add_numbers(parser, "--batches", [1, 8, 64, 256], "tokens of the step")
    add_numbers(parser, "--adapters", [1, 8, 32, 64], "different adapters among them")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds of a sequence (20)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--patience", type=float, default=600.0, metavar="SECONDS")
    add_output(parser)
    options = parser.parse_args(argv)
    if min(options.batches) < 1:
        parser.error("--batches must be at least 1")
    options.settings, options.seed = {}, 0
    return options


def main(argv: Sequence[str], commands: Commands | None = None) -> int:
    options = parse(argv)
    return sit("kernels", options, argv, _body, commands=commands)


def _body(sitting: Sitting) -> None:
    sitting.run("kernels", make_job(sitting), lambda row: finish(sitting, row))
    show_table(sitting)


def make_job(sitting: Sitting) -> Job:
    options = sitting.options
    linear_shapes(sitting.config)  # refuses a mixture of experts before a worker is started
    used = [n for n in options.adapters if n]
    return Job(
        workload="kernels",
        settings={},
        cases=[{"batch": b, "adapters": [n for n in used if n <= b]} for b in options.batches],
        config=sitting.config,
        options={"rank": options.rank, "repeats": options.repeats, "device": options.device},
        marks={"rank": options.rank},
    )


# --- in the worker -------------------------------------------------------------------------------


def measure(job: Job, say: Say) -> Iterator[dict[str, Any]]:
    """Rows of each linear, then what LoRA adds to a whole step in each of the ways."""
    from loramux.bench.ceilings import pick_device
    from loramux.bench.kernel_set import KernelSet

    device = pick_device(job.options["device"])
    added: dict[tuple[str, int, int], float] = {}
    most = max((n for case in job.cases for n in case["adapters"]), default=0)
    for linear, parts in MERGED.items():
        shapes = [linear_shapes(job.config)[part] for part in parts]
        size = 2 * shapes[0][0] * sum(outputs for _, outputs in shapes)
        count = 2 if device == "cpu" else min(MOST_SETS, max(2, -(-ROTATED_BYTES // size)))
        say(f"{linear}: {count} sets of weights")
        sets = [
            KernelSet(job.config, linear, parts, most, job.options["rank"], device)
            for _ in range(count)
        ]
        for case in job.cases:
            for n in (0, *case["adapters"]):
                for one in sets:
                    one.prepare(case["batch"], n)
                yield from _of_linear(sets, linear, case["batch"], n, job, added)
        del sets
    layers = int(job.config["num_hidden_layers"])
    for (way, batch, n), microseconds in added.items():
        total = round(layers * microseconds / 1000, 4)
        yield {"case": "step", "way": way, "batch": batch, "adapters": n, "added_ms": total}


def _of_linear(
    sets: list[KernelSet],
    linear: str,
    batch: int,
    adapters: int,
    job: Job,
    added: dict[tuple[str, int, int], float],
) -> Iterator[dict[str, Any]]:
    known: dict[tuple[str, ...], float] = {}

    def us(words: tuple[str, ...]) -> float:
        if words not in known:
            known[words] = time_us(sets, words, job.options["repeats"]) if words else 0.0
        return known[words]

    for op, (whole, rest) in (WITH_LORA if adapters else PLAIN).items():
        number = round(us(whole) - us(rest), 2)
        yield {
            "case": "kernel",
            "op": op,
            "linear": linear,
            "batch": batch,
            "adapters": adapters,
            "us": number,
        }
    for way, (whole, rest) in WAYS.items() if adapters else ():
        key = (way, batch, adapters)
        added[key] = added.get(key, 0.0) + us(whole) - us(rest)


def time_us(sets: list[KernelSet], words: tuple[str, ...], repeats: int) -> float:
    """Median microseconds of the pieces `words`, one after the other, on one set of weights."""
    import torch

    def once() -> None:
        for one in sets:
            for word in words:
                one.run(word)

    device = sets[0].device
    once()  # what is compiled is compiled now
    if device.type != "cuda":
        return 1e6 * statistics.median(_seconds(once) for _ in range(repeats)) / len(sets)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        once()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    times: list[float] = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times[2:]) / len(sets)


def _seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


# --- the table -----------------------------------------------------------------------------------


def finish(sitting: Sitting, row: dict[str, Any]) -> dict[str, Any]:
    if row["case"] != "kernel":
        return row
    return {**row, "floor_us": round(floor_us(sitting, row), 3)}


def floor_us(sitting: Sitting, row: dict[str, Any]) -> float:
    """Bytes that the piece must move over the copy rate; for products, or their arithmetic."""
    assert sitting.ceilings is not None
    parts = MERGED[row["linear"]]
    shapes = [linear_shapes(sitting.config)[part] for part in parts]
    inputs, outputs = shapes[0][0], sum(width for _, width in shapes)
    batch, ranks = row["batch"], row["adapters"] * sitting.options.rank
    a, b = ranks * len(parts) * inputs, ranks * outputs
    out = outputs // 2 if row["linear"] == "gate_up" else outputs
    moved = {
        "gemm": inputs * outputs + batch * (inputs + outputs),
        "gemm+A": inputs * outputs + a + batch * (inputs + outputs),
        "shrink": a + batch * inputs,
        "expand": b + 2 * batch * outputs,
        "expand(A)": b + 2 * batch * outputs,
        "fold": batch * (outputs + out),
        "fold+expand": b + batch * (outputs + out),
        "fold+expand(pool)": b + batch * (outputs + out),
    }[row["op"]]
    seconds: float = 2 * moved / sitting.ceilings.copy_bytes_s
    if row["op"].startswith("gemm"):
        flop = 2 * batch * (inputs * outputs + (a if row["op"] == "gemm+A" else 0))
        seconds = max(seconds, flop / sitting.ceilings.gemm_flop_s)
    return 1e6 * seconds


def show_table(sitting: Sitting) -> None:
    ops = [*PLAIN, *WITH_LORA]
    lines: dict[tuple[str, int, int], dict[str, str]] = {}
    for row in sitting.of("kernel"):
        key = (row["linear"], row["batch"], row["adapters"])
        cell = f"{row['us']:.1f} / {row['floor_us']:.1f}"
        lines.setdefault(key, {})[row["op"]] = cell
    show(
        f"pieces of one layer's linears, µs / floor, medians. {sitting.ceilings}",
        ["linear", "tokens", "LoRAs", *ops],
        ([k[0], str(k[1]), str(k[2]), *(v.get(op, "") for op in ops)] for k, v in lines.items()),
    )
    size = 2 * adapter_elements(sitting.config, sitting.options.rank)
    steps = (
        [
            row["way"],
            str(row["batch"]),
            str(row["adapters"]),
            f"{row['added_ms']:.3f}",
            f"{1000 * row['adapters'] * size / sitting.floor().ceilings.copy_bytes_s:.3f}",
        ]
        for row in sitting.of("step")
    )
    title = "what LoRA adds to the linears of a whole step"
    show(title, ["way", "tokens", "LoRAs", "added ms", "floor"], steps)
