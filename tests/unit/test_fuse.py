"""What the fused decoder is compared in before it replaces a model's own forward."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import Ministral3Config

from loramux.models import fuse as fusing
from loramux.models.fuse import fuse
from loramux.models.mrope import MRope
from parity.text_models import TextModel, attach_text, random_text
from tiny import COMMON


def test_attention_that_changes_far_in_a_context_is_noticed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ministral 3 scales its queries from some position on, which the fused decoder does not know."""
    caplog.set_level(logging.INFO, "loramux")
    rope = {
        **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "beta_fast": 32.0},
        **{"beta_slow": 1.0, "original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.5},
    }
    model = TextModel(Ministral3Config(**COMMON, head_dim=16, rope_parameters=rope)).eval()
    attached = attach_text(model.model, model.lm_head)
    assert fuse(attached, 256) is None
    assert "differs from its own forward" in caplog.text
    assert fuse(attached, 32) is not None


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_another_order_of_sections_is_noticed(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "loramux")
    model = random_text(family)
    attached = attach_text(model.model, model.lm_head)
    right = MRope.of(model.model.rotary_emb, torch.device("cpu"))
    assert right is not None
    monkeypatch.setattr(fusing, "_mrope", lambda *_: MRope((right.sections + 1) % 3))
    assert fuse(attached, 256) is None
    assert "layer 0 differs from its own forward" in caplog.text


@pytest.mark.parametrize("positions", [1, 3, 9, 10, 64])
def test_short_contexts_are_compared_too(positions: int) -> None:
    for family in ("llava", "qwen3-vl"):
        model = random_text(family)
        assert fuse(attach_text(model.model, model.lm_head), positions) is not None
