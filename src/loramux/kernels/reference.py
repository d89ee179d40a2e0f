"""The definition of correct: every op in plain torch, on any device, in the most literal order.

Sums and softmax run in float32 (float64 if the input is float64) and are rounded once, at the end;
the glue ops (`rms_norm` and below) round exactly where Hugging Face's eager code rounds.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from loramux.kernels.arguments import (
    AFFINE,
    Activation,
    AttentionBatch,
    Expand,
    LoRASite,
    NormMode,
    Segments,
    WorkList,
)
from loramux.kernels.reference_experts import combine, grouped_products, route, take_rows

__all__ = [
    "add_rms_norm",
    "combine",
    "gated",
    "gather_positions",
    "grouped_linear",
    "hidden_mask",
    "linear",
    "lora_delta",
    "lora_expand",
    "lora_shrink",
    "paged_attention",
    "rms_norm",
    "rope",
    "rope_kv",
    "route",
    "silu_mul",
    "take_rows",
    "take_tokens",
    "write_kv",
]


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
            if p in segments.affine_rows:
                gain, shift = gain_and_shift(site, p, total.dtype)  # [N] each
                total += total * gain + shift  # [t, N]
        y[start:end] = total.to(y.dtype)  # [t, N]


def _member_delta(x: torch.Tensor, site: LoRASite, s: int, p: int, r: int) -> torch.Tensor:
    """[t, in] -> [t, N]: one adapter's unscaled delta in slice `s`, zero in the other slices."""
    lo, hi = site.slice_starts[s], site.slice_starts[s + 1]
    shrunk = x @ site.a[s, p : p + r].to(x.dtype).T  # [t, r]
    grown = shrunk @ site.b[p : p + r, lo:hi].to(x.dtype)  # [t, hi - lo]
    return F.pad(grown, (lo, site.slice_starts[-1] - hi))  # [t, N]


def gain_and_shift(site: LoRASite, p: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the adapter in row `p`: [N] each, in `dtype`."""
    gain, shift = site.affine[:, p // site.place_rows].to(dtype)  # [N], [N]
    return gain, shift


def _members(work: WorkList) -> list[tuple[int, int, int, int, float, bool]]:
    """(first row, end row, pool row, column, scale, has gains and shifts) of every member of every
    chunk in use.

    The chunk says its first member's pool row, and the others are moved with it."""
    chunks = work.chunks[: int(work.counts[1])].tolist()
    rows, columns = work.member_rows.tolist(), work.member_columns.tolist()
    scales, ranks = work.member_scales.tolist(), work.member_ranks.tolist()
    return [
        (first, end, p + rows[m] - rows[start], columns[m], scales[m], ranks[m] >= AFFINE)
        for first, end, start, stop, p, *_ in chunks
        for m in range(start, stop)
    ]


def lora_shrink(
    x: torch.Tensor,
    site: LoRASite,
    work: WorkList,
    h: torch.Tensor,
    order: torch.Tensor | None = None,
    top_k: int = 1,
) -> None:
    """Write x [T, in] @ A^T of every row's members into the columns of `h` [P, T, W] that they own.

    The first of the P parts gets the sum, the others zeros."""
    if order is not None:
        x = take_rows(x, order, top_k)  # [S, in]
    ranks = site.row_r.tolist()
    for first, end, p, column, _, _ in _members(work):
        for s in range(site.num_slices):
            r = ranks[s][p]
            start, stop = column * site.num_slices + s, (column + r) * site.num_slices
            a = site.a[s, p : p + r]  # [r, in]
            shrunk = _wide(x[first:end].to(a.dtype)) @ _wide(a).T  # [t, r]
            h[:, first:end, start : stop : site.num_slices] = 0
            h[0, first:end, start : stop : site.num_slices] = shrunk.to(h.dtype)  # [t, r]


def lora_expand(y: torch.Tensor, expand: Expand) -> None:
    """Add the deltas to `y` [T, N] in place; rows without members keep their bits."""
    whole, touched = _expanded(expand, y)  # [T, N], [T]
    y[touched] = whole[touched].to(y.dtype)


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, expand: Expand | None = None
) -> torch.Tensor:
    """`x` [S, in] times `weight` [E, out, in] transposed, expert by expert, plus the deltas of `expand`
    -> [S, out]."""
    y = grouped_products(x, weight, ends)  # [S, out]
    if expand is not None:
        lora_expand(y, expand)
    return y


def _expanded(expand: Expand, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(`like` [T, N] with the deltas in wide arithmetic, which rows have any [T])."""
    site, count = expand.site, expand.site.num_slices
    whole = _wide(like).clone()  # [T, N]
    wide = whole.dtype
    touched = torch.zeros(like.shape[0], dtype=torch.bool, device=like.device)  # [T]
    ranks, row_scales = site.row_r.tolist(), site.row_scale.tolist()
    for first, end, p, column, scale, affine in _members(expand.work):
        touched[first:end] = True
        for s in range(count):
            if (r := ranks[s][p]) == 0:
                continue
            lo, hi = site.slice_starts[s], site.slice_starts[s + 1]
            start, stop = column * count + s, (column + r) * count
            h = expand.h[:, first:end, start:stop:count].to(wide).sum(0)  # [t, r]
            grown = h.to(site.b.dtype).to(wide) @ site.b[p : p + r, lo:hi].to(wide)
            whole[first:end, lo:hi] += grown * (scale * row_scales[s][p])  # [t, hi - lo]
        if affine:
            gain, shift = gain_and_shift(site, p, wide)  # [N] each
            whole[first:end] += whole[first:end] * gain + shift  # [t, N]
    return whole, touched


def _with_expand(x: torch.Tensor, expand: Expand | None) -> torch.Tensor:
    """`x` [T, N] with the delta added, not yet rounded; `x` itself where there is none."""
    return x if expand is None else _expanded(expand, x)[0]


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
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of `q` [T, H, D] over the paged cache -> [T, H, Dv], dtype of `q`: causal, but for the
    rows of `batch.last_keys`.

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
        own, seen = range(context - (end - start), context), range(first, context)
        last_keys = None if batch.last_keys is None else batch.last_keys[start:end]  # [q]
        hidden = hidden_mask(own, seen, window, q.device, last_keys)  # [q, c]
        result = _attend(queries, keys, values, hidden, scaling, softcap, sinks)  # [q, H, Dv]
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
    queries: range,
    keys: range,
    window: int,
    device: torch.device,
    last_keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """[q, c] bool: True where the query at one of the positions `queries` must not look at one of
    `keys`. `last_keys` [q] as in `AttentionBatch`."""
    own = torch.arange(queries.start, queries.stop, device=device)[:, None]  # [q, 1]
    other = torch.arange(keys.start, keys.stop, device=device)[None, :]  # [1, c]
    last = own if last_keys is None else torch.maximum(own, last_keys[:, None])  # [q, 1]
    hidden = other > last  # [q, c]
    return hidden | (other <= own - window) if window else hidden  # [q, c]


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor,
    scaling: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[q, H, D], [c, Hkv, D], [c, Hkv, Dv], [q, c] -> [q, H, Dv]; head h reads h // (H / Hkv)."""
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)  # [c, H, D]
    v = v.repeat_interleave(group, dim=1)  # [c, H, Dv]
    scores = torch.einsum("qhd,chd->hqc", q, k) * scaling  # [H, q, c]
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap  # [H, q, c]
    scores = scores.masked_fill(hidden, float("-inf"))  # [H, q, c]
    if sinks is not None:
        more = sinks.to(scores.dtype)[:, None, None].expand(-1, q.shape[0], 1)  # [H, q, 1]
        weights = torch.cat((scores, more), dim=-1).softmax(dim=-1)[..., :-1]  # [H, q, c]
    else:
        weights = scores.softmax(dim=-1)  # [H, q, c]
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
    post_weight: torch.Tensor | None = None,
    expand: Expand | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x`, `residual` [T, D] -> (norm of their sum, their sum), the sum rounded to its dtype.

    `x` takes its delta first and, with `post_weight`, a norm of its own before it is added."""
    x = _with_expand(x, expand).to(residual.dtype)  # [T, D]
    if post_weight is not None:
        x = rms_norm(x, post_weight, eps, mode)  # [T, D]
    total = residual + x  # [T, D]
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


def gated(
    gate_up: torch.Tensor, activation: Activation = "silu", expand: Expand | None = None
) -> torch.Tensor:
    """activation(gate) * up of `gate_up` [T, 2 I], gate first -> [T, I]."""
    whole = _with_expand(gate_up, expand).to(gate_up.dtype)  # [T, 2 I]
    gate, up = whole.tensor_split(2, dim=-1)  # [T, I]
    if activation == "silu":
        return silu_mul(gate, up)  # [T, I]
    return F.gelu(gate, approximate="tanh") * up  # [T, I]


def rope_kv(
    qkv: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
    mode: NormMode = "llama",
    expand: Expand | None = None,
) -> torch.Tensor:
    """From the product of the merged q, k and v layers to the queries, K and V being stored."""
    kv_heads, size = k_cache.shape[2], k_cache.shape[3]
    whole = _with_expand(qkv, expand).to(qkv.dtype)  # [T, (H + 2 Hkv) D]
    rows = whole.view(-1, heads + 2 * kv_heads, size)  # [T, H + 2 Hkv, D]
    q, k = rows[:, :heads].clone(), rows[:, heads : heads + kv_heads].clone()
    v = rows[:, heads + kv_heads :]  # [T, Hkv, D]
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps, mode), rms_norm(k, norms[1], eps, mode)
    half = table.shape[1] // 2
    cos, sin = table[positions.long()].to(q.dtype).split(half, dim=-1)  # [T, rot / 2]
    rope(q, k, torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1))
    kept = (slots >= 0).nonzero().flatten()  # [T']
    write_kv(k[kept], v[kept], k_cache, v_cache, slots[kept].long())
    return q  # [T, H, D]


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x` [T, K] times `weight` [N, K] transposed, plus `bias` [N] -> [T, N], in `out` if given."""
    if out is None:
        return F.linear(x, weight, bias)  # [T, N]
    if bias is None:
        return torch.mm(x, weight.t(), out=out)  # [T, N]
    return torch.addmm(bias, x, weight.t(), out=out)  # [T, N]


def take_tokens(ids: torch.Tensor, sources: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """`ids` [T] int32, or where `sources` [T] >= 0 the token chosen[source] -> [T] int64."""
    before: torch.Tensor = chosen[sources.clamp(min=0).long()].long()  # [T]
    return torch.where(sources >= 0, before, ids.long())  # [T]
