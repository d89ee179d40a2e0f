"""SmolLM2 with its trained adapters, all in one batch: fp32 tokens and logits equal PEFT's."""

from __future__ import annotations

from pathlib import Path

import pytest
from demo_data import BEHAVIOURS

from parity.oracle import Oracle

ADAPTERS = Path(__file__).resolve().parents[2] / "examples" / "adapters"
COUNT = 6


def test_demo_adapters_equal_peft(demo_model_path: Path) -> None:
    from loramux import LLM, LoRARequest, SamplingParams

    paths = {name: ADAPTERS / name for name in BEHAVIOURS}
    first, second, *_ = paths
    compositions: list[dict[str, float]] = [{name: 1.0} for name in paths]
    compositions += [{}, {first: 0.7, second: 1.0}]
    with LLM(
        str(demo_model_path), enable_lora=True, max_loras=4, dtype="float32", max_model_len=256
    ) as llm:
        questions = [b.held_out()[0][0] for b in BEHAVIOURS.values()] + ["What is rain?"] * 2
        prompts = [
            llm.engine.text.render_chat([{"role": "user", "content": question}])
            for question in questions
        ]
        outputs = llm.generate(
            prompts,
            SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=3),
            lora_request=[
                [
                    LoRARequest(name, scale=scale, lora_path=str(paths[name]))
                    for name, scale in c.items()
                ]
                for c in compositions
            ],
        )
        llm.engine.check_integrity()
    oracle = Oracle(demo_model_path, paths)
    for prompt, composition, output in zip(prompts, compositions, outputs, strict=True):
        answer = output.outputs[0]
        # One pass over prompt and answer: greedy means that each token is the likeliest there.
        tokens = [*prompt, *answer.token_ids]
        wanted = oracle.logits(tokens[:-1], composition)[len(prompt) - 1 :].log_softmax(-1)
        assert wanted.argmax(-1).tolist() == answer.token_ids, composition
        for step, entry in enumerate(answer.logprobs or []):
            for token, item in entry.items():
                assert item.logprob == pytest.approx(float(wanted[step, token]), abs=5e-3)
