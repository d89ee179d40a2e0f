"""The worker of loramux itself, through the offline API: python -m loramux.bench.ours CASE.json"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from loramux.bench.case import Case
from loramux.bench.worker import Answer, Generate, serve


def load(case: Case) -> Generate:
    import loramux

    llm = loramux.LLM(**llm_settings(case))
    first_tokens = FirstTokens(llm.engine.step)
    setattr(llm.engine, "step", first_tokens)  # noqa: B010  (a method may not be assigned to)
    generate = drive(llm, case, loramux.LoRARequest, loramux.SamplingParams)

    def timed(prompts: list[list[int]], adapters: list[int | None], output_len: int) -> Answer:
        first_tokens.restart()
        answer = generate(prompts, adapters, output_len)
        return Answer(answer.num_tokens, sorted(first_tokens.seen.values()))

    return timed


def llm_settings(case: Case) -> dict[str, Any]:
    """Keyword arguments of `LLM`, ours and vLLM's alike."""
    lora = {"max_loras": len(case.adapters), "max_lora_rank": case.max_rank}
    return {
        "model": case.model,
        "dtype": case.dtype,
        "max_num_seqs": case.concurrency,
        "max_model_len": case.input_len + case.output_len,
        **({"enable_lora": True, **lora} if case.adapters else {}),
    }


def drive(llm: Any, case: Case, lora_request: Any, sampling_params: Any) -> Generate:
    """A `Generate` over an `LLM` and two classes of this shape, which is also vLLM's."""
    requests = [lora_request(f"adapter-{i}", i + 1, path) for i, path in enumerate(case.adapters)]

    def generate(prompts: list[list[int]], adapters: list[int | None], output_len: int) -> Answer:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            sampling_params(temperature=0.0, max_tokens=output_len, ignore_eos=True),
            lora_request=[None if i is None else requests[i] for i in adapters],
            use_tqdm=False,
        )
        return Answer(sum(len(output.outputs[0].token_ids) for output in outputs))

    return generate


class FirstTokens:
    """Stands before the engine's `step` and notes when each request's first token came out."""

    def __init__(self, step: Callable[[], Sequence[Any]]) -> None:
        self._step = step
        self._started = 0.0
        self.seen: dict[str, float] = {}

    def restart(self) -> None:
        self.seen = {}
        self._started = time.perf_counter()

    def __call__(self) -> Sequence[Any]:
        deltas = self._step()
        now = time.perf_counter() - self._started
        for delta in deltas:
            if delta.token_ids:
                self.seen.setdefault(delta.request_id, now)
        return deltas


if __name__ == "__main__":
    sys.exit(serve(load, sys.argv[1:]))
