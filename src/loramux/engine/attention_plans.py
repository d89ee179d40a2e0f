"""FlashInfer's planner over the packed steps' own buffers, where FlashInfer can serve the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from loramux.engine.packing import PackedStep
from loramux.kernels import AttentionBatch
from loramux.kernels.flashinfer_attention import FlashInferPlanner, PlanBuffers, available
from loramux.layers.attention import PagedAttention

logger = logging.getLogger(__name__)

Lists = tuple[list[int], list[int]]
"""Of the sequences of a step: where their rows begin, and how many positions each has."""


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
    if any(attention.sinks is not None for attention in attentions):
        return "its layers have attention sinks"
    first = attentions[0]
    assert first.key_shape is not None and first.value_shape is not None
    return available(first.key_shape[1], first.value_shape[1], dtype, device)


def _buffers(packed: PackedStep) -> PlanBuffers:
    names = ("page_starts", "pages", "last_page_lens", "prefill_starts")
    return PlanBuffers(*(packed.view(packed.device, name) for name in names))


def attention_batch(
    packed: PackedStep,
    planner: FlashInferPlanner | None,
    count: int,
    max_queries: int,
    lists: Lists,
    widest: int,
) -> AttentionBatch:
    """What attention reads of a packed step of `count` sequences.

    `widest`: blocks that a row of the block tables has room for."""
    view, buffer = packed.view, packed.device
    starts = view(buffer, "page_starts")[:count]  # [Q]
    if planner is None:
        pages = view(buffer, "pages")
        columns = torch.arange(widest, device=buffer.device)  # [max_blocks]
        places = (starts.unsqueeze(1) + columns).clamp(max=len(pages) - 1)
        tables = pages[places]  # [Q, max_blocks]
    else:
        tables = starts.unsqueeze(1)  # the planner has the pages; nobody reads this
    batch = AttentionBatch(
        block_tables=tables,
        query_starts=lists[0],
        context_lens=lists[1],
        query_starts_tensor=view(buffer, "query_starts")[: count + 1],
        context_lens_tensor=view(buffer, "context_lens")[:count],
        max_queries=max_queries,
    )
    if planner is not None:
        batch.notes["flashinfer"] = planner
    return batch
