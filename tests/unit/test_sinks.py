"""Attention sinks from transformers' call to the layer, the choice of a library, and the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loramux.config import EngineConfig
from loramux.engine import attention_plans
from loramux.errors import UnsupportedModel
from loramux.layers.attention import PagedAttention, attention_function
from loramux.layers.batch import StepBatch
from loramux.models.loader import _on_meta, load_model, read_config
from loramux.models.shards import cut_model
from loramux.parallel import PlannedGroup
from tiny import save_model

HEADS, KV_HEADS, SIZE = 6, 2, 128


def _module() -> Any:
    module = nn.Module()
    module.loramux_attention = PagedAttention(StepBatch(), 0)
    return module


def _probed(module: Any, s_aux: torch.Tensor | None) -> PagedAttention:
    q = torch.randn(1, HEADS, 3, SIZE)
    k = torch.randn(1, KV_HEADS, 3, SIZE)
    attention_function(module, q, k, k, None, s_aux=s_aux)
    attention: PagedAttention = module.loramux_attention
    return attention


def test_the_probe_keeps_sinks_in_float32() -> None:
    parameter = nn.Parameter(torch.randn(HEADS).bfloat16())
    sinks = _probed(_module(), parameter).sinks
    assert sinks is not None and sinks.dtype == torch.float32 and not sinks.requires_grad
    assert torch.equal(sinks, parameter.float())
    assert _probed(_module(), None).sinks is None


@pytest.mark.parametrize(
    "s_aux", [torch.randn(HEADS), nn.Parameter(torch.randn(HEADS, 1)), nn.Parameter(torch.zeros(1))]
)
def test_what_may_change_from_step_to_step_is_refused(s_aux: torch.Tensor) -> None:
    with pytest.raises(UnsupportedModel, match="needs s_aux other than a parameter"):
        _probed(_module(), s_aux)


def test_one_layer_with_sinks_takes_the_model_from_flashinfer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_plans, "available", lambda *_: None)
    plain = [_probed(_module(), None) for _ in range(2)]
    mixed = [*plain, _probed(_module(), nn.Parameter(torch.randn(HEADS)))]
    device = torch.device("cuda")
    assert attention_plans._reason_against(plain, torch.bfloat16, device) is None
    reason = attention_plans._reason_against(mixed, torch.bfloat16, device)
    assert reason is not None and "sinks" in reason


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_hold_the_sinks_of_their_heads(tmp_path: Path, size: int) -> None:
    config = EngineConfig(model=str(save_model(tmp_path, "granite-swa")), device="cpu")
    name = "model.layers.1.self_attn.sinks"
    whole = load_model(config).attached.model.get_parameter(name)
    parts = []
    for rank in range(size):
        model = _on_meta(config, read_config(config.model, None))
        shards = cut_model(model, PlannedGroup(rank, size), None)
        part = shards.parts[name]
        q_rows = shards.parts["model.layers.1.self_attn.q_proj.weight"].index[0]
        assert model.get_parameter(name).shape == (len(whole) // size,) == whole[part.index].shape
        assert (q_rows.start, q_rows.stop) == (part.index[0].start * 16, part.index[0].stop * 16)
        parts.append(whole[part.index])
    assert torch.equal(torch.cat(parts), whole)


def test_a_plan_that_cuts_sinks_in_another_way_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(model=str(save_model(tmp_path, "granite-swa")), device="cpu")
    model = _on_meta(config, read_config(config.model, None))
    plan = {**model.tp_plan, "model.layers.*.self_attn.sinks": "local_rowwise"}
    monkeypatch.setattr(type(model), "tp_plan", plan)
    with pytest.raises(UnsupportedModel, match=r"self_attn\.sinks: .*local_rowwise"):
        cut_model(model, PlannedGroup(0, 2), None)


def test_gpt_oss_has_no_plan_for_ranks(tmp_path: Path) -> None:
    config = EngineConfig(model=str(save_model(tmp_path, "gpt-oss")), device="cpu")
    model = _on_meta(config, read_config(config.model, None))
    with pytest.raises(UnsupportedModel, match="gpt_oss cannot be cut for 2 ranks"):
        cut_model(model, PlannedGroup(0, 2), None)
