"""Attention for long chunks of one sequence on the CPU: gather its blocks, then torch's SDPA.

Sinks are not among SDPA's arguments. They enlarge the softmax's denominator and nothing else, so its
result is scaled by what of the denominator is not the sink: that takes the logarithm of the rest,
which only the op under SDPA gives out. It takes values of the keys' size alone.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from loramux.kernels.arguments import AttentionBatch
from loramux.kernels.reference import gather_positions, hidden_mask

MASK_ELEMENTS = 1 << 22
"""Queries are cut so that no mask grows beyond this."""


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    batch: AttentionBatch,
    i: int,
    scaling: float,
    window: int,
    sinks: torch.Tensor | None = None,
) -> None:
    """Fill sequence `i`'s rows of `out` [T, H, Dv] from `q` [T, H, D] and the paged caches."""
    start, end = batch.query_starts[i], batch.query_starts[i + 1]
    context = batch.context_lens[i]
    first = max(0, context - (end - start) + 1 - window) if window else 0
    keys = gather_positions(k_cache, batch.block_tables[i], first, context)  # [c, Hkv, D]
    values = gather_positions(v_cache, batch.block_tables[i], first, context)  # [c, Hkv, Dv]
    queries = q[start:end]  # [q, H, D]
    before = context - (end - start)  # positions in front of the first query
    last_keys = _beyond(batch, start, end, before)  # [q] or None
    if before == 0 and last_keys is None and (window == 0 or window >= context):
        out[start:end] = _sdpa(queries, keys, values, None, scaling, sinks)  # [q, H, Dv]
        return
    step = max(16, MASK_ELEMENTS // (context - first))
    for lo in range(0, end - start, step):
        hi = min(lo + step, end - start)
        last, further = before + hi, None
        if last_keys is not None:
            further = last_keys[lo:hi]  # [hi - lo]
            last = min(context, max(last, int(further.max()) + 1))
        low = max(first, before + lo + 1 - window) if window else first
        own, others = range(before + lo, before + hi), range(low, last)
        seen = ~hidden_mask(own, others, window, q.device, further)  # [hi - lo, last - low]
        part = slice(low - first, last - first)
        result = _sdpa(queries[lo:hi], keys[part], values[part], seen, scaling, sinks)
        out[start + lo : start + hi] = result  # [hi - lo, H, Dv]


def _beyond(batch: AttentionBatch, start: int, end: int, before: int) -> torch.Tensor | None:
    """`last_keys` [q] of the rows start..end-1, the first of which is at position `before`; None where
    all of them are causal."""
    if batch.last_keys is None:
        return None
    last_keys = batch.last_keys[start:end]  # [q]
    own = torch.arange(before, before + end - start)  # [q]
    return last_keys if bool((last_keys > own).any()) else None


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[q, H, D], [c, Hkv, D], [c, Hkv, Dv], mask [q, c] or causal -> [q, H, Dv]."""
    grouped = k.shape[1] != q.shape[1]
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))  # [1, H, q, D]
    causal = seen is None
    if sinks is not None:
        return _with_sinks(q, k, v, seen, scaling, sinks)  # [q, H, Dv]
    result = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=causal, scale=scaling, enable_gqa=grouped
    )  # [1, H, q, Dv]
    return result[0].transpose(0, 1)  # [q, H, Dv]


def _with_sinks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """[1, H, q, D], [1, Hkv, c, D], [1, Hkv, c, D], mask [q, c] or causal, [H] -> [q, H, D]."""
    mask = None
    if seen is not None:
        mask = torch.zeros_like(seen, dtype=q.dtype)  # [q, c]
        mask.masked_fill_(~seen, float("-inf"))
    result, logarithm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=seen is None, attn_mask=mask, scale=scaling
    )  # [1, H, q, D], [1, H, q] float32
    share = torch.sigmoid(logarithm[0] - sinks[:, None])  # [H, q]
    scaled: torch.Tensor = result[0] * share[..., None]  # [H, q, D] float32
    return scaled.to(q.dtype).transpose(0, 1)  # [q, H, D]
