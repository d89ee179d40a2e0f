"""`loramux bench alora`: a conversation with the base model, then evaluated by several adapters.

    base model     conversation
    adapter 1..N   conversation | invocation, question     as activated LoRA, and as plain LoRA

The same weights are served both ways, by one engine. Each repeat has a conversation of its own, which
the base model has answered before the first adapter comes; the adapters come one after the other, and
are on the device. Time to first token is from the hand-over of the prompt's tokens on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loramux.bench.geometry import Geometry, geometry, scratch_folder, write_model
from loramux.bench.random_adapters import write_adapters
from loramux.bench.report import keep_rows
from loramux.bench.sitting import Commands

WAYS = ("activated", "plain")
INVOCATION = 3  # tokens
UNTIMED = 2  # repeats: what is compiled at first use, and the adapters brought in


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="loramux bench alora",
        description="Time to first token of adapters that evaluate a conversation of the base model, "
        "as activated and as plain LoRA.",
    )
    parser.add_argument("--geometry", default="llama-3.1-8b", metavar="NAME")
    parser.add_argument("--input-len", type=int, default=4096, help="tokens talked about (4096)")
    parser.add_argument("--question-len", type=int, default=32, help="tokens of a question (32)")
    parser.add_argument("--adapters", type=int, default=3, help="that evaluate (3)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters (16)")
    parser.add_argument("--repeats", type=int, default=5, help="timed conversations (5)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--settings", type=json.loads, default={}, metavar="JSON", help="more arguments of LLM"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="a .jsonl file for the rows")
    options = parser.parse_args(argv)
    if min(options.input_len, options.adapters, options.rank, options.repeats) < 1:
        parser.error("--input-len, --adapters, --rank and --repeats must be at least 1")
    if options.question_len < 0:
        parser.error("--question-len must be at least 0")
    return options


def main(argv: Sequence[str], commands: Commands | None = None) -> int:
    """Measure, print and keep the rows."""
    options = parse(argv)
    if commands is not None:
        print("loramux bench alora: measures loramux alone", file=sys.stderr)
        return 2
    try:
        shape = geometry(options.geometry)
        longest = prompt_length(options) + 1
        if longest > shape.max_positions:
            raise ValueError(
                f"a prompt and its answer have {longest} tokens, and {options.geometry} takes "
                f"{shape.max_positions}; give a smaller --input-len"
            )
    except ValueError as error:
        print(f"loramux bench alora: {error}", file=sys.stderr)
        return 2
    with scratch_folder(1 << 30) as scratch:
        bench = AloraBench(options, shape, Path(scratch))
        try:
            keep_rows(bench.rows(), "alora", options, argv)
        finally:
            bench.llm.close()
    return 0


def prompt_length(options: argparse.Namespace) -> int:
    """Tokens of an evaluation."""
    return int(options.input_len + INVOCATION + options.question_len)


def invocation(number: int, vocab: int) -> list[int]:
    """The tokens that invoke an adapter; they are in no conversation."""
    return [vocab - 1 - number] * INVOCATION


class AloraBench:
    """An engine that serves each adapter's weights twice."""

    def __init__(self, options: argparse.Namespace, shape: Geometry, folder: Path):
        from loramux.llm import LLM
        from loramux.offline_arguments import LoRARequest

        self.options, self.shape, self.begun = options, shape, time.perf_counter()
        self.dice = random.Random(options.seed)
        self.llm = LLM(
            str(write_model(folder / "model", shape)),
            load_format="dummy",
            enable_lora=True,
            device=options.device,
            **{
                "max_loras": len(WAYS) * options.adapters,
                "max_lora_rank": options.rank,
                "max_num_seqs": 8,
                "max_model_len": min(shape.max_positions, prompt_length(options) + 256),
                **options.settings,
            },
        )
        self.say("the engine runs")
        for path in make_adapters(folder, shape, options):
            self.llm.add_lora(LoRARequest(path.name, lora_path=str(path)))
        self.say("the adapters are registered")

    def rows(self) -> Iterator[dict[str, Any]]:
        """The base model's, then each adapter's, activated and plain: medians."""
        options = self.options
        times: dict[tuple[str, int], list[float]] = defaultdict(list)
        cached: dict[tuple[str, int], int] = {}
        for number in range(UNTIMED + options.repeats):
            self.say(f"conversation {number + 1}")
            for key, (seconds, tokens) in self.converse().items():
                cached[key] = tokens
                if number >= UNTIMED:
                    times[key].append(1000 * seconds)
        medians = {key: statistics.median(took) for key, took in times.items()}
        for (way, adapter), took in times.items():
            row = {
                "case": way,
                "adapter": adapter,
                "prompt_tokens": prompt_length(options) if adapter else options.input_len,
                "cached_tokens": cached[way, adapter],
                "ttft_ms": round(medians[way, adapter], 3),
                "spread_ms": round(max(took) - min(took), 3),
                "repeats": len(took),
            }
            if way == "activated":
                ratio = medians["plain", adapter] / medians[way, adapter]
                row["plain_over_activated"] = round(ratio, 2)
            yield row

    def converse(self) -> dict[tuple[str, int], tuple[float, int]]:
        """(way, adapter from 1 on) -> (seconds to the first token, tokens found in the prefix cache)."""
        options, vocab = self.options, self.shape.vocab
        talk = self.tokens(options.input_len)
        found = {("base", 0): self.first_token(talk, None)}
        for way in WAYS:
            for number in range(options.adapters):
                question = self.tokens(options.question_len)
                prompt = [*talk, *invocation(number, vocab), *question]
                found[way, number + 1] = self.first_token(prompt, f"{way}-{number}")
        return found

    def tokens(self, count: int) -> list[int]:
        """Random ones, which invoke nobody."""
        ids = range(3, self.shape.vocab - self.options.adapters)
        return [self.dice.choice(ids) for _ in range(count)]

    def first_token(self, prompt: Sequence[int], adapter: str | None) -> tuple[float, int]:
        from loramux.types import AdapterUse, SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
        uses = [] if adapter is None else [AdapterUse(adapter)]
        engine, start = self.llm.engine, time.perf_counter()
        engine.submit(f"{start}", prompt, params, uses)
        while True:
            deltas = engine.step()
            for delta in deltas:
                if delta.error is not None:
                    raise delta.error
                return time.perf_counter() - start, delta.num_cached_tokens
            if not deltas:
                engine.wait()

    def say(self, text: str) -> None:
        """Progress, with the seconds since the start."""
        print(f"[{time.perf_counter() - self.begun:6.1f} s] {text}", file=sys.stderr, flush=True)


def make_adapters(folder: Path, shape: Geometry, options: argparse.Namespace) -> list[Path]:
    """Folders `plain-N` and `activated-N`, of the same weights."""
    paths = []
    made = write_adapters(
        folder / "made", shape.config, options.adapters, options.rank, seed=options.seed
    )
    for number, source in enumerate(made):
        settings = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
        for way in WAYS:
            path = folder / f"{way}-{number}"
            path.mkdir()
            own = {"alora_invocation_tokens": invocation(number, shape.vocab)}
            content = json.dumps(settings | (own if way == "activated" else {}))
            (path / "adapter_config.json").write_text(content, encoding="utf-8")
            os.link(source / "adapter_model.safetensors", path / "adapter_model.safetensors")
            paths.append(path)
    return paths
