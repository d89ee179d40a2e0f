"""Two ranks on two GPUs over NCCL answer as one does, with and without captured graphs."""

from __future__ import annotations

import pytest

from loramux import LLM, LoRARequest, SamplingParams
from tiny import TinyWorld

pytestmark = pytest.mark.multigpu

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [list(range(5 + i, 25 + 3 * i)) for i in range(4)]


@pytest.mark.parametrize("fully", [False, True], ids=["default", "fully"])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_two_gpus_answer_as_one(tiny_world: TinyWorld, eager: bool, fully: bool) -> None:
    loras = [None, *(LoRARequest(n, 1, str(tiny_world.adapters[n])) for n in "abc")]
    settings = {"device": "cuda", "dtype": "float32", "enforce_eager": eager, "max_loras": 2}
    settings |= {"max_lora_rank": 8, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}
    with LLM(str(tiny_world.model), enable_lora=True, **settings) as llm:
        alone = llm.generate(PROMPTS, GREEDY, lora_request=loras)
    settings |= {"tensor_parallel_size": 2, "fully_sharded_loras": fully}
    with LLM(str(tiny_world.model), enable_lora=True, **settings) as llm:
        together = llm.generate(PROMPTS, GREEDY, lora_request=loras)
        llm.engine.check_integrity()
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
