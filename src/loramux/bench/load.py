"""`loramux bench load`: what the first use of an adapter costs its request, and everybody else.

Streams decode without end, half on the base model and half on one adapter, while requests for
other adapters come in one at a time. `load_ms` is a cold adapter's time to first token less a
warm one's; a gap is the time between two tokens of a stream while such a request is served.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from loramux.bench.jobs import Job, Say
from loramux.bench.sitting import Commands, Sitting, add_engine, add_model, add_output, show, sit
from loramux.bench.system import News, System

PLACES = {"page cache": "disk", "host": "host"}  # where an adapter comes from -> System.place
SETTLE_STEPS = 10  # between two requests
PROBE_TOKENS = 2
UNTIMED = 3


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="loramux bench load",
        description="First use of cold adapters while streams decode: out of files in the page "
        "cache, and out of the engine's host memory.",
    )
    add_model(parser)
    parser.add_argument("--streams", type=int, default=8, help="sequences that decode (8)")
    parser.add_argument("--loads", type=int, default=16, help="cold requests of each kind (16)")
    parser.add_argument("--input-len", type=int, default=64, help="prompt tokens (64)")
    parser.add_argument("--max-loras", type=int, default=4, help="adapters on the device (4)")
    parser.add_argument("--quiet-steps", type=int, default=200, help="steps without a load (200)")
    add_engine(parser)
    add_output(parser)
    options = parser.parse_args(argv)
    if min(options.streams, options.loads) < 1 or options.max_loras < 2:
        parser.error("--streams and --loads must be at least 1, --max-loras 2")
    return options


def main(argv: Sequence[str], commands: Commands | None = None) -> int:
    options = parse(argv)
    return sit(
        "load",
        options,
        argv,
        _body,
        num_bytes=4 << 30,
        adapters=_counts(options)[2],
        commands=commands,
    )


def _body(sitting: Sitting) -> None:
    sitting.run("load", make_job(sitting), lambda row: finish(sitting, row))
    show_table(sitting)


def make_job(sitting: Sitting) -> Job:
    """Adapter 0 stays in use. Turning over `host_cycle` others finds each on the host and none on
    the device; turning over all of them finds each in neither, since both evict the least recent."""
    options = sitting.options
    host_cycle, host, count = _counts(options)
    lora = {
        "max_loras": options.max_loras,
        "max_lora_rank": options.rank,
        "max_cpu_loras": host,
    }
    longest = int(sitting.config.get("max_position_embeddings", 2048))
    return Job(
        workload="load",
        settings=sitting.settings(options.streams + 1, min(longest, 8192), **lora),
        cases=[{"source": source} for source in PLACES],
        config=sitting.config,
        adapters=sitting.adapters(count, options.rank),
        options={
            "streams": options.streams,
            "loads": options.loads,
            "input_len": options.input_len,
            "quiet_steps": options.quiet_steps,
            "host_cycle": host_cycle,
            "seed": options.seed,
            "device": options.device,
        },
        marks={"rank": options.rank, **lora},
    )


def _counts(options: argparse.Namespace) -> tuple[int, int, int]:
    """Adapters that take turns on the host, places there, and adapters in all."""
    host_cycle = options.max_loras + 1
    host = host_cycle + 2
    return host_cycle, host, 1 + max(2 * host, options.loads)


# --- in the worker -------------------------------------------------------------------------------


class Streams:
    """Sequences that decode on and on, and the time between their tokens."""

    def __init__(self, system: System, job: Job, dice: random.Random):
        self._system, self._job, self._dice = system, job, dice
        self._last: dict[str, float] = {}
        self._probes = 0
        self.gaps: list[float] = []
        self._streams = {f"stream-{i}": i for i in range(job.options["streams"])}
        self._starts = 0
        for name in list(self._streams):
            self._start(name)
        while len(self._last) < len(self._streams):
            self.step()

    def _start(self, name: str) -> None:
        length = self._job.options["input_len"]
        longest = int(self._job.settings["max_model_len"]) - length
        adapter = 0 if self._streams[name] % 2 else None
        self._system.submit(name, self.prompt(), longest, adapter)

    def prompt(self) -> list[int]:
        length = self._job.options["input_len"]
        return [self._dice.randrange(3, self._job.vocab_size) for _ in range(length)]

    def step(self) -> list[News]:
        news = self._system.step()
        now = time.perf_counter()
        for item in news:
            if item.request_id not in self._streams:
                continue
            if item.num_tokens:
                if item.request_id in self._last:
                    self.gaps.append(now - self._last[item.request_id])
                self._last[item.request_id] = now
            if item.finished:  # the context is full: from the beginning, without a gap for that
                del self._last[item.request_id]
                self._start(item.request_id)
        return news

    def settle(self, steps: int = SETTLE_STEPS) -> None:
        for _ in range(steps):
            self.step()

    def probe(self, adapter: int) -> tuple[float, float]:
        """One request: (seconds to its first token, the streams' longest gap meanwhile)."""
        self._probes += 1
        name = f"probe-{self._probes}"
        prompt = self.prompt()
        self.settle()
        self.gaps.clear()
        started = time.perf_counter()
        self._system.submit(name, prompt, PROBE_TOKENS, adapter)
        first: float | None = None
        while True:
            for item in self.step():
                if item.request_id == name:
                    if first is None and item.num_tokens:
                        first = time.perf_counter() - started
                    if item.finished:
                        assert first is not None
                        self.settle(2)  # what the load still does meanwhile shows in these
                        return first, max(self.gaps)

    def close(self) -> None:
        for name in self._streams:
            self._system.cancel(name)
        self._system.step()


def measure(job: Job, system: System, say: Say) -> Iterator[dict[str, Any]]:
    options = job.options
    dice = random.Random(options["seed"])
    streams = Streams(system, job, dice)
    others = len(job.adapters) - 1
    say("warming up")
    turn = 0
    for adapter in [*([0] * UNTIMED), *range(others, others - UNTIMED, -1)]:
        streams.probe(adapter)
    streams.settle()
    streams.gaps.clear()
    streams.settle(options["quiet_steps"])
    quiet = list(streams.gaps)
    warm = [streams.probe(0) for _ in range(options["loads"])]
    for case in job.cases:
        source = case["source"]
        cycle = options["host_cycle"] if source == "host" else others
        say(f"{options['loads']} adapters from {source}")
        for _ in range(cycle if source == "host" else 0):  # bring these to the host
            streams.probe(1 + turn % cycle)
            turn += 1
        cold, places = [], []
        system.take_read_times()
        for _ in range(options["loads"]):
            adapter = 1 + turn % cycle
            turn += 1
            places.append(system.place(adapter))
            cold.append(streams.probe(adapter))
        reads = system.take_read_times()
        read = {"read_ms": round(1000 * statistics.median(reads), 3)} if reads else {}
        yield {**_row(quiet, warm, cold), **read, "source": source, "places": sorted(set(places))}
        turn = 0
    streams.close()


def _row(
    quiet: list[float], warm: list[tuple[float, float]], cold: list[tuple[float, float]]
) -> dict[str, Any]:
    """Milliseconds of one kind of load."""

    def ms(seconds: float) -> float:
        return round(1000 * seconds, 3)

    def ttft(probes: list[tuple[float, float]]) -> float:
        return statistics.median(first for first, _ in probes)

    def gap(probes: list[tuple[float, float]]) -> float:
        return max(longest for _, longest in probes)

    return {
        "case": "load",
        "load_ms": ms(ttft(cold) - ttft(warm)),
        "max_gap_ms": ms(gap(cold)),
        "median_gap_ms": ms(statistics.median(quiet)),
        "added_gap_ms": ms(gap(cold) - gap(warm)),
        "warm_max_gap_ms": ms(gap(warm)),
        "quiet_max_gap_ms": ms(max(quiet)),
        "ttft_ms": ms(ttft(cold)),
        "max_ttft_ms": ms(max(first for first, _ in cold)),
        "warm_ttft_ms": ms(ttft(warm)),
        "median_longest_gap_ms": ms(statistics.median(longest for _, longest in cold)),
        "loads": len(cold),
    }


# --- the table -----------------------------------------------------------------------------------


def finish(sitting: Sitting, row: dict[str, Any]) -> dict[str, Any]:
    if row["case"] != "load":
        return row
    size = sitting.adapter_bytes(sitting.options.rank)
    floor_ms = sitting.floor().load_ms(size, from_disk=row["source"] != "host")
    return {**row, "adapter_mb": round(size / 1e6, 2), "floor_ms": round(floor_ms, 3)}


def show_table(sitting: Sitting) -> None:
    title = (
        f"first use of a cold adapter beside {sitting.options.streams} streams, ms; load: first "
        f"token less a warm adapter's; gaps: between tokens of a stream. {sitting.ceilings}"
    )
    columns = ["system", "MB", "from", "load", "floor", "TTFT", "warm TTFT"]
    columns += ["longest gap", "with warm", "without", "median"]
    rows = (
        [
            row["system"],
            f"{row['adapter_mb']:.1f}",
            row["source"] + _doubt(row),
            *(
                f"{row[name]:.2f}"
                for name in (
                    *("load_ms", "floor_ms", "ttft_ms", "warm_ttft_ms", "max_gap_ms"),
                    *("warm_max_gap_ms", "quiet_max_gap_ms", "median_gap_ms"),
                )
            ),
        ]
        for row in sitting.of("load")
    )
    show(title, columns, rows)


def _doubt(row: dict[str, Any]) -> str:
    """Says so where the adapters were not where the case wants them."""
    expected = [PLACES[row["source"]]]
    return "" if row["places"] in (expected, ["?"]) else f" ({', '.join(row['places'])})"
