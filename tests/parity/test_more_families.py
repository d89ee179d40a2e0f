"""Families beyond those that the other tests go through: served as PEFT does, or refused by name.

transformers has them all; what decides is whether attention goes through its registry.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from loramux import LLM, LoRARequest, PoolingParams, SamplingParams
from loramux.errors import UnsupportedModel
from tiny import COMMON, tokenizer

COUNT = 8
GREEDY = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
SMALL: dict[str, Any] = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
}
HEADS = {"head_dim": 8}
PARTS = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
GPT2 = {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32}
SINKS = {"head_dim": 16, "sliding_window": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

SERVED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["cohere2", "gemma", "gemma2", "glm4", "granite", "helium", "olmo2"], HEADS),
    **dict.fromkeys(["apertus", "cohere", "exaone4", "hunyuan_v1_dense", "nemotron"], HEADS),
    **dict.fromkeys(["ernie4_5", "glm", "olmo3", "seed_oss", "smollm3"], HEADS),
    **{family: {} for family in ("gpt_neox", "phi", "stablelm", "starcoder2")},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_oss": {**EXPERTS, **SINKS},
    "granitemoe": EXPERTS,  # its experts' layers are its own, and PEFT leaves them alone
    "granitemoe_swa": {**EXPERTS, **SINKS, "attention_multiplier": 0.3},
    "mimo_v2_flash": {  # sinks in its layers with a window alone, and experts
        **{**SINKS, "num_hidden_layers": 3, "v_head_dim": 16, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 16},
    },
    "opt": OPT,
    "youtu": {**PARTS, "v_head_dim": 8, "num_key_value_heads": 4},  # latent attention
}
BASE_ALONE: dict[str, dict[str, Any]] = {
    "mixtral": EXPERTS,
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **HEADS},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"n_layer": 2, "n_head": 4}, "BloomForCausalLM has no attention layers"),
    "diffllama": ({}, r"DiffLlamaForCausalLM is not served: its layers .* attend more than once"),
    "deepseek_v4": ({}, "DeepseekV4ForCausalLM is not served: .*heavily_compressed_attention"),
    "llama4_text": (
        {"attention_chunk_size": 16, "num_local_experts": 2, **HEADS},
        "Llama4ForCausalLM is not served: .*chunked_attention",
    ),
    "mamba": ({}, "MambaForCausalLM has no attention layers"),
}
PROMPTS = [list(range(5, 25)), list(range(30, 37))]


def _save(folder: Path, family: str, more: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**SMALL, **more})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(0, 2)
            elif parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def _expected(model: PreTrainedModel | PeftModel) -> list[list[int]]:
    answers = []
    for prompt in PROMPTS:
        out = model.generate(
            input_ids=torch.tensor([prompt]),
            **{"max_new_tokens": COUNT, "min_new_tokens": COUNT, "do_sample": False},
            **{"eos_token_id": None, "pad_token_id": 0},
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@torch.no_grad()
def _hidden(model: PreTrainedModel) -> list[torch.Tensor]:
    """The final hidden state [D] of each prompt's last token."""
    ids = [torch.tensor([prompt]) for prompt in PROMPTS]
    return [model.base_model(input_ids=one).last_hidden_state[0, -1] for one in ids]


def _open(folder: Path) -> LLM:
    settings = {"device": "cpu", "dtype": "float32", "max_lora_rank": 8}
    return LLM(str(folder), enable_lora=True, **settings)


@pytest.mark.parametrize("family", sorted(SERVED))
def test_adapters_on_all_linears_beside_the_base(tmp_path: Path, family: str) -> None:
    model = _save(tmp_path / "model", family, SERVED[family])
    expected, hidden = _expected(model), _hidden(model)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(**settings)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    lora = LoRARequest("all", 1, str(tmp_path / "adapter"))
    with _open(tmp_path / "model") as llm:
        out = llm.generate(PROMPTS * 2, GREEDY, lora_request=[None, None, lora, lora])
        pooled = llm.embed(
            PROMPTS * 2,
            pooling_params=PoolingParams(normalize=False),
            lora_request=[None, None, lora, lora],
        )
    assert [o.outputs[0].token_ids for o in out] == expected + _expected(adapted)
    got = torch.tensor([o.outputs.embedding for o in pooled])  # [2 prompts * 2, D]
    wanted = torch.stack([*hidden, *_hidden(adapted.base_model.model)])
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=2e-3)


@pytest.mark.parametrize("family", sorted(BASE_ALONE))
def test_models_whose_adapters_are_not_served_yet(tmp_path: Path, family: str) -> None:
    model = _save(tmp_path / "model", family, BASE_ALONE[family])
    with _open(tmp_path / "model") as llm:
        out = llm.generate(PROMPTS, GREEDY)
    assert [o.outputs[0].token_ids for o in out] == _expected(model)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_models_that_cannot_be_entered_are_named(tmp_path: Path, family: str) -> None:
    more, reason = REFUSED[family]
    _save(tmp_path / "model", family, more)
    with pytest.raises(UnsupportedModel, match=reason):
        _open(tmp_path / "model")
