"""Entering models: what is refused and why, and parts that replace transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from loramux import LLM
from loramux.config import EngineConfig
from loramux.errors import ConfigError, UnsupportedModel
from loramux.models.loader import load_model, load_schema
from loramux.models.norms import FusedRMSNorm, fuse_norms
from tiny import COMMON, VOCAB, TinyWorld, save_model, tokenizer

REFUSED: dict[str, tuple[Any, str]] = {
    "mamba": (
        lambda: transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
        "no attention layers",
    ),
    "bloom": (
        lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2),
        "no attention layers",
    ),
    "falcon": (
        lambda: transformers.FalconConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
        ),
        "attention registry",
    ),
    "gpt-oss in MXFP4": (
        lambda: transformers.GptOssConfig(
            **COMMON, head_dim=16, quantization_config={"quant_method": "mxfp4"}
        ),
        "quantised",
    ),
    "t5": (lambda: transformers.T5Config(vocab_size=VOCAB, d_model=32), "encoder-decoder"),
    "paligemma": (transformers.PaliGemmaConfig, "both directions"),
    "llama4 with vision": (transformers.Llama4Config, "of the multimodal models only gemma3"),
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_models_without_our_doors_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    make, word = REFUSED[kind]
    config = make()
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=word) as caught:
        load_schema(EngineConfig(model=str(tmp_path)))
    text = str(caught.value).lower()
    assert config.model_type in text or type(config).__name__.removesuffix("Config").lower() in text


def test_all_that_stands_against_a_multimodal_model_is_said_at_once(tmp_path: Path) -> None:
    config = transformers.PaliGemmaConfig(quantization_config={"quant_method": "fp8"})
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel) as caught:
        load_schema(EngineConfig(model=str(tmp_path), tensor_parallel_size=2))
    for reason in ("both directions", "tensor_parallel_size > 1", "quantised"):
        assert reason in str(caught.value)


def test_broken_checkpoints_are_refused(tiny_world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_model(EngineConfig(model=str(tmp_path)))
    transformers.AutoConfig.from_pretrained(tiny_world.model).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="weights of"):
        load_model(EngineConfig(model=str(tmp_path)))
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_world.model / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lacks 1 weights"):
        load_model(EngineConfig(model=str(tmp_path), device="cpu"))


def test_longrope_context_ends_where_the_factors_switch(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    }
    model = save_model(
        tmp_path / "m", "phi3", rope_parameters=rope, original_max_position_embeddings=64
    )
    with LLM(str(model), device="cpu") as llm:
        assert llm.config.max_model_len == 64
    with pytest.raises(ConfigError, match="rotary factors"):
        LLM(str(model), device="cpu", max_model_len=65)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm, Olmo2RMSNorm])
def test_norms_are_replaced_by_their_equals(kind: type[nn.Module], dtype: torch.dtype) -> None:
    module = nn.Sequential(kind(48), nn.Identity()).to(dtype)
    with torch.no_grad():
        module[0].weight.normal_()
    x = torch.randn(2, 7, 48).to(dtype)
    before, weight = module(x), module[0].weight.clone()
    assert fuse_norms(module) == 1
    assert isinstance(module[0], FusedRMSNorm) and torch.equal(module[0].weight, weight)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(module(x), before, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_whose_weight_is_wider_keep_the_dtype_of_their_input(dtype: torch.dtype) -> None:
    """GPT-OSS in float16 keeps the weights of its norms in float32."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = GptOssRMSNorm(48)
            self.dtype = dtype

    body = Body()
    nn.init.normal_(body.norm.weight)
    x = torch.randn(2, 7, 48).to(dtype)
    before = body.norm(x)
    assert fuse_norms(body) == 1 and body.norm.mode == "plain"
    assert torch.equal(body.norm(x), before)


def test_a_norm_that_computes_something_else_stays(caplog: pytest.LogCaptureFixture) -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    module = nn.Sequential(OddRMSNorm(16))
    assert fuse_norms(module) == 0 and isinstance(module[0], OddRMSNorm)


def test_linear_layers_that_share_an_input_are_computed_once(tiny_world: TinyWorld) -> None:
    loaded = load_model(EngineConfig(model=str(tiny_world.model), device="cpu"))
    names = loaded.attached.names
    layer = "model.layers.0."
    q, k = names[f"{layer}self_attn.q_proj"][0], names[f"{layer}self_attn.k_proj"][0]
    assert q is k and q.num_slices == 3
    assert names[f"{layer}mlp.gate_proj"][0] is names[f"{layer}mlp.up_proj"][0]
    assert names[f"{layer}self_attn.o_proj"][0].num_slices == 1
