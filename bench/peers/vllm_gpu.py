"""vLLM on the workloads of `loramux bench decode | throughput | load`: the same jobs, the same rows.

As a worker of loramux's driver, which is then asked for both in one run:

    loramux bench decode --geometry llama-3.1-8b --peers bench/peers --vllm-python PYTHON

or by itself, in an environment that has vLLM and nothing of loramux's, with the same options:

    PYTHONPATH=src python bench/peers/vllm_gpu.py decode --geometry llama-3.1-8b
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loramux.bench import main
from loramux.bench.jobs import work
from loramux.bench.report import VLLM
from loramux.bench.system import Chosen, News, System

WORKLOADS = ("decode", "throughput", "load")


class Vllm:
    """vLLM through its offline engine, in this process."""

    def __init__(self, settings: dict[str, Any]):
        # The engine in this process: what is timed is its step, not the way to another process.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        self._engine = LLM(**settings).llm_engine
        self._params, self._request = SamplingParams, LoRARequest
        self._adapters: list[Any] = []
        self._seen: dict[str, int] = {}

    def register(self, adapters: Sequence[str]) -> None:
        """vLLM reads an adapter when its first request is scheduled."""
        self._adapters = [
            self._request(f"adapter-{i}", i + 1, path) for i, path in enumerate(adapters)
        ]

    def submit(self, request_id: str, prompt: list[int], max_tokens: int, adapter: Chosen) -> None:
        if isinstance(adapter, tuple):
            raise ValueError(
                "vLLM knows no sums of adapters: leave --sums away, or --systems loramux"
            )
        params = self._params(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        self._engine.add_request(
            request_id,
            {"prompt_token_ids": prompt},
            params,
            lora_request=None if adapter is None else self._adapters[adapter],
        )

    def step(self) -> list[News]:
        news = []
        for output in self._engine.step():
            name, total = output.request_id, len(output.outputs[0].token_ids)
            news.append(News(name, total - self._seen.get(name, 0), output.finished))
            self._seen[name] = total
            if output.finished:
                del self._seen[name]
        return news

    def cancel(self, request_id: str) -> None:
        self._engine.abort_request([request_id])

    def place(self, adapter: int) -> str:
        return "?"

    def take_read_times(self) -> list[float]:
        return []

    def close(self) -> None:
        self._engine = None


def open_vllm(settings: dict[str, Any]) -> System:
    return Vllm(settings)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in WORKLOADS:
        sys.exit(main(sys.argv[1:], {VLLM: [sys.executable, str(Path(__file__).resolve())]}))
    sys.exit(work(open_vllm, sys.argv[1:]))
