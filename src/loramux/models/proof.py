"""A model behind our attention against the same model behind transformers' own.

What a model does between its layers we never see, so whatever else it keeps from step to step, or gives
to attention that we do not know, would be lost without a word. Here a sequence runs in two steps over a
small cache, and once whole without one; what comes out must agree.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from loramux.errors import UnsupportedModel
from loramux.kernels import AttentionBatch
from loramux.models.attach import ATTENTION_NAME, Attached
from loramux.models.choices import Choices

logger = logging.getLogger(__name__)

BLOCK = 16  # positions
FIRST, ALL = 6, 9  # tokens of the first step and of both
MOST_ERROR = 0.3  # of a token's logits in 16 bits
MOST_ERROR_FP32 = 1e-2


@torch.inference_mode()
def check_paging(attached: Attached) -> None:
    """Raises UnsupportedModel where the model computes something else behind our attention.

    Call before a KV cache is allocated."""
    model = attached.model
    generator = torch.Generator().manual_seed(0)
    vocab = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(vocab, (ALL,), generator=generator).to(attached.device)  # [T]
    choices = Choices(model)
    with small_cache(attached), choices.kept():
        for start, end in ((0, FIRST), (FIRST, ALL)):
            with small_step(attached, start, end):
                places = torch.arange(start, end, device=ids.device)  # [T']
                got = attached.own_forward(ids[start:end], places).float()  # [T', V]
    try:
        _set_attention(attached, "eager")
        with choices.repeated(own=attached.group.size == 1):
            expected = _logits(model, ids)[FIRST:]  # [T', V]
    except Exception:  # some model without attention of its own; nothing to compare with
        logger.warning("what the model computes could not be compared with its own", exc_info=True)
        return
    finally:
        _set_attention(attached, ATTENTION_NAME)
    tiny = torch.finfo(torch.float32).tiny  # weights may be all zero
    errors = (got - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(tiny)  # [T']
    most = MOST_ERROR_FP32 if model.dtype == torch.float32 else MOST_ERROR
    # The best token tells: what is missing is missing for all.
    if not float(errors.min()) <= most:
        raise UnsupportedModel(
            f"{type(model).__name__} is not served: in steps over a paged cache its logits differ from "
            f"its own by {float(errors.min()):.1e}",
            field="model",
            remedy="it keeps something from step to step, or attends in a way, that is not served yet",
        )


def _set_attention(attached: Attached, name: str) -> None:
    if attached.language is None:
        attached.model.set_attn_implementation(name)
    else:
        attached.language.attend_through(name)


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What the whole model makes of tokens [T] from position 0 on: [T, V] float32."""
    positions = torch.arange(len(ids), device=ids.device)  # [T]
    output = model(input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False)
    return output.logits[0].float()  # [T, V]


@contextmanager
def small_cache(attached: Attached) -> Iterator[None]:
    """A KV cache of one block."""
    try:
        for attention in attached.attentions:
            attention.allocate(1, BLOCK, attached.model.dtype, str(attached.device))
        yield
    finally:
        for attention in attached.attentions:
            attention.free()


@contextmanager
def small_step(attached: Attached, start: int, end: int) -> Iterator[None]:
    """A step over that cache in which one sequence runs from position `start` to `end`."""
    device, batch = attached.device, attached.batch
    slots = torch.int64 if device.type == "cpu" else torch.int32
    batch.slots = torch.arange(start, end, device=device, dtype=slots)  # [T]
    batch.positions = torch.arange(start, end, device=device, dtype=torch.int32)  # [T]
    batch.attention = AttentionBatch(
        block_tables=torch.zeros(1, 1, dtype=torch.int32, device=device),
        query_starts=[0, end - start],
        context_lens=[end],
        query_starts_tensor=torch.tensor([0, end - start], dtype=torch.int32, device=device),
        context_lens_tensor=torch.tensor([end], dtype=torch.int32, device=device),
    )
    try:
        yield
    finally:
        batch.clear()
