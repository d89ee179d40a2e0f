"""Angles of tokens with three positions, against transformers' own rotary embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5OmniTextConfig,
    Qwen2VLTextConfig,
    Qwen3VLTextConfig,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniRotaryEmbedding
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from loramux.models.fuse import _table, fuse
from loramux.models.mrope import MRope
from parity.text_models import attach_text, random_text

CPU = torch.device("cpu")
EMBEDDINGS: dict[str, tuple[type[nn.Module], Any]] = {
    "qwen2-vl": (Qwen2VLRotaryEmbedding, Qwen2VLTextConfig),
    "qwen2.5-vl": (Qwen2_5_VLRotaryEmbedding, Qwen2_5_VLTextConfig),
    "qwen2.5-omni": (Qwen2_5OmniRotaryEmbedding, Qwen2_5OmniTextConfig),
    "qwen3-vl": (Qwen3VLTextRotaryEmbedding, Qwen3VLTextConfig),
}


def _rotary(name: str, sections: list[int]) -> nn.Module:
    kind, config = EMBEDDINGS[name]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    size = 2 * sum(sections)
    settings = {"hidden_size": 4 * size, "num_attention_heads": 4, "num_key_value_heads": 2}
    return kind(config(**settings, head_dim=size, rope_parameters=rope))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sections", [[16, 24, 24], [24, 20, 20], [8, 12, 12], [4, 2, 2]], ids=str)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_rows_are_those_of_the_models_own(
    name: str, sections: list[int], dtype: torch.dtype
) -> None:
    rotary, half = _rotary(name, sections), sum(sections)
    mrope = MRope.of(rotary, CPU)
    assert mrope is not None
    plain = _table(rotary, "", 500, dtype, CPU, 2 * half)  # [500, rot]
    table = torch.cat((plain, torch.full((40, 2 * half), torch.nan, dtype=dtype)))  # [540, rot]
    positions = torch.randint(500, (3, 33))  # [3, T]
    mrope.gather(table, positions, 500)
    cos, sin = rotary(torch.zeros(1, 1, dtype=dtype), positions.unsqueeze(1))  # [1, T, 2 half]
    assert torch.equal(table[500:533], torch.cat((cos[0, :, :half], sin[0, :, :half]), -1))
    assert torch.equal(table[:500], plain)
    assert table[533:].isnan().all()
    equal = torch.randint(500, (1, 7)).expand(3, -1)  # [3, T]
    mrope.gather(table, equal, 500)
    assert torch.equal(table[500:507], table[equal[0]])


def test_one_position_a_token_is_no_mrope() -> None:
    assert MRope.of(LlamaRotaryEmbedding(LlamaConfig()), CPU) is None


def test_angles_of_several_positions_are_refused() -> None:
    class Mixed(nn.Module):
        mrope_section = (2, 1, 1)

        def forward(self, x: torch.Tensor, positions: torch.Tensor) -> Any:
            angles = positions.sum(0).unsqueeze(-1).float() * torch.ones(8)  # [1, T, 8]
            return angles.cos(), angles.sin()

    with pytest.raises(ValueError, match="with one position each"):
        MRope.of(Mixed(), CPU)


def test_a_decoder_has_the_rows_that_it_was_asked_for() -> None:
    own = random_text("qwen2.5-vl")
    decoder = fuse(attach_text(own.model, own.lm_head), 64, 30)
    assert decoder is not None and (decoder.num_positions, decoder.extra_rows) == (64, 30)
    assert all(len(table) == 94 for table in decoder.tables.values())
    assert decoder.set_positions(torch.randint(64, (3, 30))) == 64
    with pytest.raises(ValueError, match="no rows for 31 tokens"):
        decoder.set_positions(torch.randint(64, (3, 31)))
    plain = random_text("llava")
    decoder = fuse(attach_text(plain.model, plain.lm_head), 64, 30)
    assert decoder is not None and decoder.extra_rows == 0
    assert all(len(table) == 64 for table in decoder.tables.values())
    with pytest.raises(ValueError, match="no rows for 1 tokens"):
        decoder.set_positions(torch.zeros(3, 1, dtype=torch.long))
