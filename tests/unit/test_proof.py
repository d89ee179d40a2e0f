"""Models that would be computed wrong behind our attention are refused, by what they compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DiffLlamaConfig, PreTrainedModel

from loramux import LLM
from loramux.config import EngineConfig
from loramux.errors import UnsupportedModel
from loramux.models import proof
from loramux.models.attach import ATTENTION_NAME, Attached, attach, register_attention
from loramux.models.loader import load_model
from loramux.models.proof import check_paging
from tiny import TinyWorld


def _attached(folder: Path, dtype: torch.dtype = torch.float32) -> Attached:
    register_attention()
    config = AutoConfig.from_pretrained(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation=ATTENTION_NAME
    )
    return attach(model.eval(), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_is_right_is_left_as_it_was(tiny_world: TinyWorld, dtype: torch.dtype) -> None:
    attached = _attached(tiny_world.model, dtype)
    check_paging(attached)
    assert attached.model.config._attn_implementation == ATTENTION_NAME
    assert all(attention.k_cache is None for attention in attached.attentions)
    assert attached.batch.attention is None


def test_ranks_compare_too(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each rank's part of the model gives the whole's logits."""
    monkeypatch.setattr(proof, "MOST_ERROR_FP32", -1.0)  # nothing is that equal
    settings = {"device": "cpu", "dtype": "float32", "tensor_parallel_size": 2}
    with pytest.raises(UnsupportedModel, match=r"logits differ from its own by [\d.]+e-0"):
        LLM(str(tiny_world.model), **settings)
    assert "could not be compared" not in caplog.text


def test_weights_of_zero_are_no_difference(tiny_world: TinyWorld) -> None:
    attached = _attached(tiny_world.model)
    for merged, _ in attached.names.values():
        assert merged.weight is not None
        merged.weight.zero_()
    check_paging(attached)


def test_what_is_kept_from_step_to_step_is_noticed(tiny_world: TinyWorld) -> None:
    attached = _attached(tiny_world.model)

    def shift(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> object:
        """Each token takes its neighbour's output along, if that is of the same step."""
        neighbours = torch.nn.functional.pad(output[:, :-1], (0, 0, 1, 0))  # [1, T, D]
        return output + neighbours  # [1, T, D]

    attached.model.model.layers[0].mlp.register_forward_hook(shift)  # type: ignore[union-attr, operator]
    with pytest.raises(UnsupportedModel, match="logits differ from its own by"):
        check_paging(attached)


def test_a_layer_that_attends_twice_is_refused(tmp_path: Path) -> None:
    """Its second values overwrite the first in the cache, which only the next step sees."""
    config = DiffLlamaConfig(
        **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"layers \[0, 1\] attend more than once"):
        load_model(EngineConfig(model=str(tmp_path), device="cpu", dtype="float32"))
