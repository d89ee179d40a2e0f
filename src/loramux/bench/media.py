"""`loramux bench media`: requests with an image each, over adapters on language model and tower.

One engine serves all of it: the same requests without adapters and with them, in turn, all handed over
at once with their images already made into the processor's tensors. Then one request alone, and the
same image again behind another text, from the call to the first token with the processor's work.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loramux.bench.geometry import VisionGeometry, geometry, write_model
from loramux.bench.report import keep_rows, usable_cores
from loramux.bench.sitting import Commands

ADAPTER_STD = 0.02


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="loramux bench media",
        description="Requests with one image each, without adapters and with adapters that touch "
        "the tower and the connector as well.",
    )
    parser.add_argument("--geometry", default="qwen2.5-vl-7b", metavar="NAME")
    parser.add_argument("--requests", type=int, default=64, help="at once (64)")
    parser.add_argument("--adapters", type=int, default=8, help="they take turns (8)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters (16)")
    parser.add_argument("--side", type=int, default=1024, help="pixels of an image's side (1024)")
    parser.add_argument("--text-len", type=int, default=32, help="tokens beside the image (32)")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of an answer (64)")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each case (3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--settings", type=json.loads, default={}, metavar="JSON", help="more arguments of LLM"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="a .jsonl file for the rows")
    return parser.parse_args(argv)


def main(argv: Sequence[str], commands: Commands | None = None) -> int:
    """Measure, print and keep the rows."""
    options = parse(argv)
    shape = geometry(options.geometry)
    if commands is not None or not isinstance(shape, VisionGeometry):
        print("loramux bench media: measures loramux on a geometry with a tower", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as scratch:
        bench = MediaBench(options, shape, Path(scratch))
        try:
            keep_rows(bench.rows(), "media", options, argv)
        finally:
            bench.llm.close()
    return 0


class MediaBench:
    """An engine with its adapters, and images."""

    def __init__(self, options: argparse.Namespace, shape: VisionGeometry, folder: Path):
        from loramux.llm import LLM
        from loramux.offline_arguments import LoRARequest

        self.options, self.shape, self.begun = options, shape, time.perf_counter()
        self.dice = random.Random(options.seed)
        model = str(write_model(folder / "model", shape))
        self.llm = LLM(
            model,
            load_format="dummy",
            enable_lora=True,
            enable_tower_connector_lora=True,
            max_loras=options.adapters,
            max_lora_rank=options.rank,
            max_num_seqs=max(options.requests, 8),
            max_model_len=min(shape.max_positions, 8192),
            **options.settings,
        )
        self.say("the engine runs")
        paths = write_adapters(folder, self.llm, options.adapters, options.rank, options.seed)
        self.loras = [LoRARequest(path.name, lora_path=str(path)) for path in paths]
        for lora in self.loras:
            self.llm.add_lora(lora)
        self.say("the adapters are registered")

    def rows(self) -> Any:
        """What was measured, row by row."""
        options = self.options
        self.run(self.prompts(8), adapted=True, count=8)  # warms up kernels and loads adapters
        yield from self.seen_again()
        seconds: dict[int, list[float]] = {0: [], options.adapters: []}
        for number in range(options.runs):
            for count, times in seconds.items():
                self.say(f"run {number + 1} with {count} adapters")
                prompts = self.prompts(options.requests)
                times.append(self.run(prompts, adapted=count > 0, count=options.requests))
            base = statistics.median(seconds[0])
            for count, times in seconds.items():
                took = statistics.median(times)
                yield {
                    "case": "requests",
                    "runs": len(times),
                    "adapters": count,
                    "requests": options.requests,
                    "prompt_tokens": len(prompts[0].token_ids),
                    "vectors": prompts[0].items[0].num_vectors,
                    "seconds": round(took, 4),
                    "spread_s": round(max(times) - min(times), 4),
                    "ratio": round(took / base, 4),
                }

    def say(self, text: str) -> None:
        """Progress, with the seconds since the start."""
        print(f"[{time.perf_counter() - self.begun:6.1f} s] {text}", file=sys.stderr, flush=True)

    def prompts(self, count: int) -> list[Any]:
        """Prompts with new images and texts, ready for the engine."""
        images = [self.image() for _ in range(count)]
        with ThreadPoolExecutor(min(8, usable_cores())) as pool:
            return list(pool.map(self.prepared, images))

    def image(self) -> Any:
        """Noise, decoded."""
        import numpy as np
        from PIL import Image as Pixels

        from loramux.media.in_memory import image_in_memory

        side = self.options.side
        noise = np.frombuffer(self.dice.randbytes(side * side * 3), np.uint8)
        return image_in_memory(Pixels.fromarray(noise.reshape(side, side, 3)))

    def prepared(self, image: Any) -> Any:
        """Half of the text, the image, the rest."""
        ids = self.shape.first_media_id
        text = [self.dice.randrange(3, ids) for _ in range(self.options.text_len)]
        half = len(text) // 2
        tokens = [*text[:half], ids, ids + 3, ids + 1, *text[half:]]
        return self.llm.engine.media.prepare(tokens, [image])

    def run(self, prompts: Sequence[Any], *, adapted: bool, count: int) -> float:
        """Seconds from the first prompt's hand-over to the last one's end."""
        start = time.perf_counter()
        for i, prompt in enumerate(prompts[:count]):
            self.submit(f"{start}-{i}", prompt, i if adapted else None, self.options.output_len)
        self.drain(count)
        return time.perf_counter() - start

    def submit(self, name: str, prompt: Any, lora: int | None, length: int) -> None:
        from loramux.types import AdapterUse, SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False
        )
        uses = [] if lora is None else [AdapterUse(self.loras[lora % len(self.loras)].lora_name)]
        self.llm.engine.submit(name, prompt, params, uses)

    def drain(self, count: int) -> None:
        """Step until so many answers have ended."""
        while count:
            deltas = self.llm.engine.step()
            if not deltas:
                self.llm.engine.wait()
            for delta in deltas:
                if delta.error is not None:
                    raise delta.error
                count -= delta.finished

    def seen_again(self) -> Any:
        """The first token of a request, and of another with the same image, under an adapter each."""
        for adapted in (False, True):
            first: list[float] = []
            again: list[float] = []
            for _ in range(max(3, self.options.runs)):
                image = self.image()
                for times in (first, again):
                    start = time.perf_counter()
                    prompt = self.prepared(image)
                    self.submit(f"{start}", prompt, 0 if adapted else None, 1)
                    self.drain(1)
                    times.append(1000 * (time.perf_counter() - start))
            once, twice = statistics.median(first), statistics.median(again)
            yield {
                "case": "seen again",
                "adapters": int(adapted),
                "first_ms": round(once, 2),
                "again_ms": round(twice, 2),
                "ratio": round(once / twice, 2),
            }


def write_adapters(folder: Path, llm: Any, count: int, r: int, seed: int) -> list[Path]:
    """`count` PEFT folders of random adapters on every linear layer that may have one."""
    import torch
    from safetensors.torch import save_file

    modules = llm.engine.runner.attached.schema.modules.values()
    dice = torch.Generator().manual_seed(seed)
    suffixes = sorted({module.name.rpartition(".")[2] for module in modules})
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": suffixes}
    paths = []
    for i in range(count):
        tensors = {}
        for module in modules:
            shapes = {"A": (r, module.in_features), "B": (module.out_features, r)}
            for half, shape in shapes.items():
                numbers = torch.randn(shape, generator=dice).mul_(ADAPTER_STD)
                key = f"base_model.model.{module.name}.lora_{half}.weight"
                tensors[key] = numbers.bfloat16()
        path = folder / f"adapter-{i}"
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
        save_file(tensors, path / "adapter_model.safetensors")
        paths.append(path)
    return paths
