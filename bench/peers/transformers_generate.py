"""transformers' own `generate` on the base model, the requests as one batch of equal lengths.

PYTHONPATH=src python bench/peers/transformers_generate.py CASE.json
"""

from __future__ import annotations

import sys
import time
from typing import Any

from loramux.bench.case import Case
from loramux.bench.worker import Answer, Generate, serve


def load_model(case: Case) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=getattr(torch, case.dtype))
    # Exactly output_len tokens for everybody: nothing ends an answer early.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def generate_with(model: Any, prompts: list[list[int]], output_len: int, **extra: Any) -> Answer:
    """One `generate` call; a stopping criterion that never stops notes the first token's time."""
    import torch

    tokens = torch.tensor(prompts)
    seen: list[float] = []
    started = time.perf_counter()

    def watch(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        seen.append(time.perf_counter() - started)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    with torch.inference_mode():
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=output_len,
            min_new_tokens=output_len,
            stopping_criteria=[watch],
            **extra,
        )
    return Answer((out.shape[1] - tokens.shape[1]) * out.shape[0], [seen[0]] * len(prompts))


def load(case: Case) -> Generate:
    if case.adapters:
        raise ValueError("this peer measures the base model; peft_mixed.py takes adapters")
    model = load_model(case)

    def generate(prompts: list[list[int]], adapters: list[int | None], output_len: int) -> Answer:
        return generate_with(model, prompts, output_len)

    return generate


if __name__ == "__main__":
    sys.exit(serve(load, sys.argv[1:]))
