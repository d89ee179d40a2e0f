"""FlashInfer's planner over the packed steps' own buffers, where FlashInfer can serve the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from loramux.engine.packing import PackedStep
from loramux.kernels.flashinfer_attention import FlashInferPlanner, PlanBuffers, available
from loramux.layers.attention import PagedAttention

logger = logging.getLogger(__name__)


def make_planner(
    attentions: Sequence[PagedAttention],
    decode: PackedStep,
    mixed: PackedStep,
    block_size: int,
    dtype: torch.dtype,
) -> FlashInferPlanner | None:
    """A planner for all layers, or None (with a line in the log on a GPU) where Triton attends."""
    device = decode.device.device
    reason = _reason_against(attentions, dtype, device)
    if reason is not None:
        if device.type == "cuda":
            logger.info("attention runs in Triton, not in FlashInfer: %s", reason)
        return None
    first = attentions[0]
    assert first.key_shape is not None
    return FlashInferPlanner(
        *(device, first.num_heads, *first.key_shape, block_size, dtype),
        kinds=[attention.kind for attention in attentions],
        max_batch=mixed.capacity.sequences,
        max_blocks=decode.capacity.pages,
        max_rows=decode.capacity.sequences,
        buffers=_buffers(decode),
        prefill_buffers=_buffers(mixed),
    )


def _reason_against(
    attentions: Sequence[PagedAttention], dtype: torch.dtype, device: torch.device
) -> str | None:
    shapes = {(a.num_heads, a.key_shape, a.value_shape) for a in attentions}
    if len(shapes) != 1:
        return "its layers have different heads"
    first = attentions[0]
    assert first.key_shape is not None and first.value_shape is not None
    return available(first.key_shape[1], first.value_shape[1], dtype, device)


def _buffers(packed: PackedStep) -> PlanBuffers:
    names = ("page_starts", "pages", "last_page_lens", "prefill_starts")
    return PlanBuffers(*(packed.view(packed.device, name) for name in names))
