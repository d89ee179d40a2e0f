"""On a GPU the demo adapters write, greedily and in fp32, what they write on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from demo_data import BEHAVIOURS

ADAPTERS = Path(__file__).resolve().parents[2] / "examples" / "adapters"
QUESTIONS = 4  # for each adapter, all in one batch with the base model's


@pytest.mark.gpu
def test_text_is_that_of_the_cpu(demo_model_path: Path) -> None:
    from loramux import LLM, LoRARequest, SamplingParams

    asked: list[tuple[str | None, str]] = [
        (b.name, question) for b in BEHAVIOURS.values() for question, _ in b.held_out()[:QUESTIONS]
    ]
    asked += [(None, question) for _, question in asked[:QUESTIONS]]
    texts = {}
    for device in ("cpu", "cuda"):
        with LLM(
            str(demo_model_path),
            enable_lora=True,
            max_loras=4,
            dtype="float32",
            max_model_len=256,
            device=device,
            kv_cache_memory_bytes=256 << 20,
        ) as llm:
            outputs = llm.generate(
                [
                    llm.engine.text.render_chat([{"role": "user", "content": question}])
                    for _, question in asked
                ],
                SamplingParams(temperature=0, max_tokens=48),
                lora_request=[
                    LoRARequest(name, lora_path=str(ADAPTERS / name)) if name else None
                    for name, _ in asked
                ],
            )
            llm.engine.check_integrity()
        texts[device] = [output.outputs[0].text for output in outputs]
    assert all(texts["cpu"])
    assert texts["cuda"] == texts["cpu"]
