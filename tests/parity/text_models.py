"""The language models of tiny multimodal families, alone with a head, as causal models that can be
attached; and steps over a small cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5OmniThinkerTextModel,
)
from transformers.modeling_outputs import CausalLMOutput

from loramux.kernels import AttentionBatch
from loramux.models.attach import ATTENTION_NAME, Attached, attach, register_attention
from parity.multimodal import FAMILIES
from tiny import VOCAB

BLOCK = 4  # positions


class TextModel(PreTrainedModel):
    """A family's text model and a head; further arguments go to the text model."""

    config_class = PreTrainedConfig
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        if config.model_type == "qwen2_5_omni_text":  # no class of `AutoModel`'s
            self.model = Qwen2_5OmniThinkerTextModel(config)
        else:
            self.model = AutoModel.from_config(
                config, attn_implementation=config._attn_implementation
            )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, *, logits_to_keep: torch.Tensor | None = None, **inputs: Any) -> Any:
        hidden = self.model(**inputs).last_hidden_state  # [1, T, D]
        kept = hidden if logits_to_keep is None else hidden[:, logits_to_keep]  # [1, B, D]
        return CausalLMOutput(logits=self.lm_head(kept))


def random_text(family: str, **more: Any) -> TextModel:
    """The eager fp32 text model of `family` with random weights. `more` goes into its configuration."""
    ids = dict.fromkeys(FAMILIES[family].tokens, 3)
    config = AutoConfig.for_model(**{**FAMILIES[family].config(ids, VOCAB)["text_config"], **more})
    config._attn_implementation = "eager"
    model = TextModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.mul_(6.0)
        elif "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
        else:
            parameter.normal_(0, 0.3)
    return model


def attach_text(body: PreTrainedModel, head: nn.Module) -> Attached:
    """A copy of a text model and its head, attached."""
    register_attention()
    config = copy.deepcopy(body.config)
    config._attn_implementation = ATTENTION_NAME
    model = TextModel(config).eval().requires_grad_(False)
    model.model.load_state_dict(body.state_dict())
    model.lm_head.load_state_dict(head.state_dict())
    return attach(model, None)


@contextmanager
def cache_of(attached: Attached, positions: int) -> Iterator[torch.Tensor]:
    """A cache for a sequence of so many positions, in scattered blocks: its block table [1, blocks]."""
    count = -(-positions // BLOCK)
    try:
        for attention in attached.attentions:
            attention.allocate(count, BLOCK, attached.model.dtype, "cpu")
        yield torch.randperm(count).int().unsqueeze(0)  # [1, blocks]
    finally:
        for attention in attached.attentions:
            attention.free()


def run_step(
    attached: Attached,
    table: torch.Tensor,
    rows: range,
    positions: torch.Tensor,
    last_keys: torch.Tensor | None,
    forward: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """What `forward` gives in a step of tokens `rows` of the sequence with that block table. `positions`
    and `last_keys` [T] are theirs."""
    batch, at = attached.batch, torch.arange(rows.start, rows.stop)  # [T]
    batch.slots = table[0, at // BLOCK].long() * BLOCK + at % BLOCK  # [T]
    batch.positions = positions.int()  # [T]
    batch.attention = AttentionBatch(
        block_tables=table,
        query_starts=[0, len(rows)],
        context_lens=[rows.stop],
        query_starts_tensor=torch.tensor([0, len(rows)], dtype=torch.int32),
        context_lens_tensor=torch.tensor([rows.stop], dtype=torch.int32),
        last_keys=last_keys,
    )
    try:
        with torch.inference_mode():
            return forward()
    finally:
        batch.clear()
