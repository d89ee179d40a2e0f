"""The definition of correct: every op in plain torch, on any device, in the most literal order.

Sums and softmax run in float32 (float64 if the input is float64) and are rounded once, at the end;
the glue ops (`rms_norm` and below) round exactly where Hugging Face's eager code rounds.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from loramux.kernels.arguments import AttentionBatch, LoRASite, NormMode, Segments


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Up to the dtype in which the arithmetic runs."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def lora_delta(y: torch.Tensor, x: torch.Tensor, site: LoRASite, segments: Segments) -> None:
    """Add the adapters' deltas to `y` [T, N] in place, from the layer's input `x` [T, in]."""
    if segments.num_segments == 0:
        return
    offsets = segments.member_offsets.tolist()
    rows, scales = segments.member_rows.tolist(), segments.member_scales.tolist()
    ranks, row_scales = site.row_r.tolist(), site.row_scale.tolist()
    spans = list(zip(segments.starts.tolist(), segments.ends.tolist(), strict=True))
    for g, (start, end) in enumerate(spans[: segments.num_segments]):
        if start >= end:
            continue
        inputs = _wide(x[start:end])  # [t, in]
        total = _wide(y[start:end]).clone()  # [t, N]
        for m in range(offsets[g], offsets[g + 1]):
            p = rows[m]
            for s in range(site.num_slices):
                factor, r = scales[m] * row_scales[s][p], ranks[s][p]
                if r:
                    total += _member_delta(inputs, site, s, p, r) * factor  # [t, N]
        y[start:end] = total.to(y.dtype)  # [t, N]


def _member_delta(x: torch.Tensor, site: LoRASite, s: int, p: int, r: int) -> torch.Tensor:
    """[t, in] -> [t, N]: one adapter's unscaled delta in slice `s`, zero in the other slices."""
    lo, hi = site.slice_starts[s], site.slice_starts[s + 1]
    shrunk = x @ site.a[s, p : p + r].to(x.dtype).T  # [t, r]
    grown = shrunk @ site.b[p : p + r, lo:hi].to(x.dtype)  # [t, hi - lo]
    return F.pad(grown, (lo, site.slice_starts[-1] - hi))  # [t, N]


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Store `k` [T, Hkv, D] and `v` [T, Hkv, Dv] in the caches' slots `slots` [T] int64."""
    size = k_cache.shape[1]
    # Two indices, not one into a flattened cache: flattening may copy, and the copy gets the write.
    where = (slots // size, slots % size)
    k_cache.index_put_(where, k)  # [num_blocks, block_size, Hkv, D]
    v_cache.index_put_(where, v)  # [num_blocks, block_size, Hkv, Dv]


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Causal attention of `q` [T, H, D] over the paged cache -> [T, H, Dv], dtype of `q`.

    Rows that no sequence owns come out zero.
    """
    out = q.new_zeros(q.shape[0], q.shape[1], v_cache.shape[-1])  # [T, H, Dv]
    for i, context in enumerate(batch.context_lens):
        start, end = batch.query_starts[i], batch.query_starts[i + 1]
        if start == end:
            continue
        # Blocks that the window has left behind may be someone else's by now: do not read them.
        first = max(0, context - (end - start) + 1 - window) if window else 0
        keys = _wide(gather_positions(k_cache, batch.block_tables[i], first, context))
        values = _wide(gather_positions(v_cache, batch.block_tables[i], first, context))
        queries = _wide(q[start:end])  # [q, H, D]
        hidden = hidden_mask(end - start, context, first, window, q.device)  # [q, c]
        result = _attend(queries, keys, values, hidden, scaling, softcap)  # [q, H, Dv]
        out[start:end] = result.to(q.dtype)  # [q, H, Dv]
    return out


def gather_positions(
    cache: torch.Tensor, table: torch.Tensor, first: int, last: int
) -> torch.Tensor:
    """Positions first..last-1 of one sequence, out of `cache` [num_blocks, block_size, Hkv, D]
    by its block table [max_blocks] -> [last - first, Hkv, D]."""
    size = cache.shape[1]
    blocks = table[first // size : (last + size - 1) // size]  # [n]
    rows = cache.index_select(0, blocks).flatten(0, 1)  # [n * block_size, Hkv, D]
    skip = first - first // size * size
    return rows[skip : skip + last - first]  # [last - first, Hkv, D]


def hidden_mask(
    queries: int, context: int, first: int, window: int, device: torch.device
) -> torch.Tensor:
    """[queries, context - first] bool: True where a query must not look."""
    own = torch.arange(context - queries, context, device=device)[:, None]  # [q, 1]
    other = torch.arange(first, context, device=device)[None, :]  # [1, c]
    hidden = other > own  # [q, c]
    return hidden | (other <= own - window) if window else hidden  # [q, c]


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """[q, H, D], [c, Hkv, D], [c, Hkv, Dv], [q, c] -> [q, H, Dv]; head h reads h // (H / Hkv)."""
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)  # [c, H, D]
    v = v.repeat_interleave(group, dim=1)  # [c, H, Dv]
    scores = torch.einsum("qhd,chd->hqc", q, k) * scaling  # [H, q, c]
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap  # [H, q, c]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)  # [H, q, c]
    return torch.einsum("hqc,chd->qhd", weights, v)  # [q, H, Dv]


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, mode: NormMode = "llama"
) -> torch.Tensor:
    """`x` [..., D], `weight` [D] -> [..., D]; `mode` says where HF rounds (see `NormMode`)."""
    wide = _wide(x)  # [..., D]
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # [..., D]
    if mode == "llama":
        return weight * normed.to(x.dtype)  # [..., D]
    factor = _wide(weight) if mode == "plain" else 1.0 + _wide(weight)  # [D]
    return (normed * factor).to(x.dtype)  # [..., D]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    mode: NormMode = "llama",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x`, `residual` [..., D] -> (norm of their sum, their sum), the sum rounded to its dtype."""
    total = residual + x  # [..., D]
    return rms_norm(total, weight, eps, mode), total


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(`gate`) * `up`, both [T, I] -> [T, I]; silu is rounded to the dtype in between."""
    return F.silu(gate) * up  # [T, I]


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate `q` [T, H, D] and `k` [T, Hkv, D] in place (HF's rotate_half form).

    `cos`, `sin` [T, rot] with rot <= D: the first rot features turn, the others stay.
    """
    half = cos.shape[-1] // 2
    for heads in (q, k):
        turn = heads[..., : 2 * half]  # [T, H, rot]
        rotated = torch.cat((-turn[..., half:], turn[..., :half]), dim=-1)  # [T, H, rot]
        turn.copy_(turn * cos[:, None, :] + rotated * sin[:, None, :])  # [T, H, rot]
