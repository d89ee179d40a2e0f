"""`--device auto` takes the GPU, and its answers are those of the CPU in fp32."""

from __future__ import annotations

from typing import Any

import pytest

from loramux import LLM, LoRARequest, SamplingParams
from tiny import TinyWorld, save_model

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


def _answers(world: TinyWorld, **settings: Any) -> list[list[int]]:
    loras: list[Any] = [None]
    loras += [LoRARequest(n, 1, str(p)) for n, p in world.adapters.items()]
    loras += [[LoRARequest("a", scale=0.7), LoRARequest("b")], None]
    prompts = [[5 + i, 9, 44, 102, 33, 9, 71] * (i + 1) for i in range(len(loras))]
    with LLM(
        str(world.model),
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
        max_cpu_loras=3,
        **settings,
    ) as llm:
        outputs = llm.generate(prompts, GREEDY, lora_request=loras)
        llm.engine.check_integrity()
        assert llm.config.device == ("cpu" if settings.get("device") == "cpu" else "cuda")
    return [output.outputs[0].token_ids for output in outputs]


def test_auto_is_the_gpu_and_agrees_with_the_cpu(tiny_world: TinyWorld) -> None:
    kv = {"kv_cache_memory_bytes": 64 << 20}
    assert _answers(tiny_world, **kv) == _answers(tiny_world, device="cpu", **kv)


def test_half_precision_runs(tiny_world: TinyWorld) -> None:
    for dtype in ("bfloat16", "float16"):
        answers = _answers(tiny_world, dtype=dtype, kv_cache_memory_bytes=64 << 20)
        assert all(len(answer) == 10 for answer in answers)


def test_the_default_budget_fits(tmp_path: Any) -> None:
    model = save_model(tmp_path / "model", "qwen3")
    with LLM(str(model), gpu_memory_utilization=0.3) as llm:
        assert len(llm.generate([[5] * 40], GREEDY)[0].outputs[0].token_ids) == 10
