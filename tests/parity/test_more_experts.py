"""More families of mixtures of experts: adapters in their own layout and in the other, on experts, on
routers where they multiply by a parameter, and on attention, in one batch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from loramux import LLM, SamplingParams
from parity.moe import DEEPSEEK, FAMILIES, HEADS, MergedOracle, make_adapter, save_moe
from parity.oracle import Composition, requests_for
from tiny import VOCAB

COUNT = 4
SMALL: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
GROUPS: dict[str, Any] = {
    **{"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
}
FULL: dict[str, Any] = {"layer_types": ["full_attention"] * 3}
MORE: dict[str, dict[str, Any]] = {
    "afmoe": {**SMALL, "num_shared_experts": 1, "num_dense_layers": 1},
    "cohere2_moe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**DEEPSEEK, "q_lora_rank": 24, "topk_method": "noaux_tc"},
    "dots1": GROUPS,
    "ernie4_5_moe": {
        **{"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 24},
        **{"moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    },
    "flex_olmo": {"num_experts": 6, "num_experts_per_tok": 2},
    "gemma4_text": {
        **{"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
        "enable_moe_block": True,
    },
    "glm4_moe": GROUPS,
    "granitemoe": LOCAL,
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 32},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "jamba": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "use_mamba_kernels": False},
        **{"attn_layer_period": 1, "attn_layer_offset": 0},
        **{"expert_layer_period": 1, "expert_layer_offset": 0},
    },
    "lfm2_moe": {**SMALL, "num_dense_layers": 1, **FULL},
    "minimax": {**LOCAL, **FULL},
    "minimax_m2": LOCAL,
    "phimoe": LOCAL,
    "qwen3_next": {**SMALL, "shared_expert_intermediate_size": 32, **FULL},
}
COMPOSITIONS: list[Composition] = [{}, {"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 1.0}]


@pytest.mark.parametrize("family", list(MORE))
def test_answers_equal_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setitem(FAMILIES, family, {**HEADS, **MORE[family]})
    model = save_moe(tmp_path / "model", family)
    settings = {"device": "cpu", "max_model_len": 128, "kv_cache_memory_bytes": 32 << 20}
    settings |= {"max_loras": 2, "max_lora_rank": 8, "enable_mixed_moe_lora_format": True}
    with LLM(str(model), enable_lora=True, **settings) as llm:
        schema = llm.engine.runner.attached.schema
        experts = next(iter(schema.experts.values()))
        parent = experts.name.rpartition(".")[0]
        routers = [
            name.removeprefix("model.layers.").partition(".")[2]
            for name, spec in schema.modules.items()
            if name.rpartition(".")[0] == parent and spec.out_features == experts.num_experts
        ]
        projection = next(n.rpartition(".")[2] for n in schema.modules if ".self_attn." in n)
        own = "per_expert" if experts.per_expert else "fused"
        router, linears = (routers or [None])[0], (projection,)
        made = {
            "a": make_adapter(model, tmp_path / "a", own, seed=1, router=router, linears=linears),
            "b": make_adapter(model, tmp_path / "b", "fused", seed=2, linears=linears),
        }
        oracle, dice = MergedOracle(model, made), random.Random(1)
        prompts = [[dice.randrange(3, VOCAB) for _ in range(n)] for n in (9, 19, 30, 12)]
        params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
        paths = {name: adapter.path for name, adapter in made.items()}
        requests = requests_for(paths, COMPOSITIONS)
        outputs = llm.generate(prompts, params, lora_request=requests)
    expected = [oracle.greedy(p, c, COUNT) for p, c in zip(prompts, COMPOSITIONS, strict=True)]
    assert [output.outputs[0].token_ids for output in outputs] == expected
