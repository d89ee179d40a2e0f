"""The ops on the CPU: checks in Python, work in C++ (`cpu_kernels.cpp`), called through ctypes.

A model step makes some hundred of these calls, so each looks up what stays the same once and
leaves it in the `notes` of its argument object. Inputs that the C++ does not take go to the twin.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import pairwise

import torch

from loramux.kernels import cpu_prefill, reference
from loramux.kernels.arguments import AttentionBatch, Expand, LoRASite, NormMode, Segments
from loramux.kernels.cpu_glue import add_rms_norm, gated, rms_norm, rope, silu_mul
from loramux.kernels.cpu_library import DTYPES, holding, releasing
from loramux.kernels.reference import (
    combine,
    grouped_linear,
    linear,
    lora_expand,
    lora_shrink,
    route,
    take_rows,
    take_tokens,
)

__all__ = [
    "add_rms_norm",
    "combine",
    "gated",
    "grouped_linear",
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

LONG_CHUNK = 16
"""From this many queries of one sequence on, attention by matrix products is faster."""
HOLD_ROWS = 32
"""Calls with at most this many rows are too short to hand Python's lock to another thread."""

_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _Attention(ctypes.Structure):
    """`AttentionArgs` of cpu_attention.h."""

    _fields_ = [
        *((name, _P) for name in ("q", "k", "v", "out", "tables", "starts", "contexts", "chosen")),
        *((name, _P) for name in ("sinks", "last_keys")),
        *((name, _I) for name in ("num_chosen", "table_stride", "q_token", "q_head", "k_block")),
        *((name, _I) for name in ("v_block", "heads", "kv_heads", "dim", "v_dim", "block_size")),
        *((name, _I) for name in ("window", "dtype", "threads", "num_blocks")),
        *((name, _D) for name in ("scaling", "softcap")),
    ]


class _Site(ctypes.Structure):
    """`Site` of cpu_lora.h."""

    _fields_ = [
        *((name, _P) for name in ("a", "b", "row_r", "row_scale", "slice_starts")),
        *((name, _I) for name in ("slices", "rows", "in_features", "width", "dtype")),
    ]


class _Segments(ctypes.Structure):
    """`Segments` of cpu_lora.h."""

    _fields_ = [
        *((name, _P) for name in ("starts", "ends", "offsets", "member_rows", "member_scales")),
        ("count", _I),
    ]


def _site(site: LoRASite) -> ctypes.c_void_p | None:
    """Address of the site's C struct; None if the C++ does not know its dtype."""
    if "cpu" not in site.notes:
        if site.a.dtype not in DTYPES:
            site.notes["cpu"] = (None,)
        else:
            slices, rows, width = site.a.shape
            starts = (_I * (slices + 1))(*site.slice_starts)
            struct = _Site(
                site.a.data_ptr(),
                site.b.data_ptr(),
                site.row_r.data_ptr(),
                site.row_scale.data_ptr(),
                ctypes.addressof(starts),
                *(slices, rows, width, site.slice_starts[-1], DTYPES[site.a.dtype]),
            )
            site.notes["cpu"] = (ctypes.c_void_p(ctypes.addressof(struct)), struct, starts)
    address: ctypes.c_void_p | None = site.notes["cpu"][0]
    return address


def _segments(segments: Segments) -> ctypes.c_void_p:
    """Address of the segments' C struct."""
    if "cpu" not in segments.notes:
        tensors = {
            torch.int32: ("starts", "ends", "member_offsets", "member_rows"),
            torch.float32: ("member_scales",),
        }
        pointers = []
        for dtype, names in tensors.items():
            for name in names:
                tensor = getattr(segments, name)
                if tensor.dtype != dtype or not tensor.is_contiguous() or not tensor.is_cpu:
                    raise ValueError(f"Segments.{name} must be contiguous {dtype} on the CPU")
                pointers.append(tensor.data_ptr())
        struct = _Segments(*pointers, segments.num_segments)
        segments.notes["cpu"] = (ctypes.c_void_p(ctypes.addressof(struct)), struct)
    address: ctypes.c_void_p = segments.notes["cpu"][0]
    return address


def lora_delta(y: torch.Tensor, x: torch.Tensor, site: LoRASite, segments: Segments) -> None:
    """See `loramux.kernels.lora_delta`: `y` [T, N] += deltas from `x` [T, in]."""
    if segments.num_segments == 0:
        return None
    if segments.affine_rows:
        return _delta_in_turn(y, x, site, segments)
    dtype, address = DTYPES.get(y.dtype), _site(site)
    x_stride, x_step = x.stride()
    y_stride, y_step = y.stride()
    if dtype is None or address is None or x_step != 1 or y_step != 1:
        return reference.lora_delta(y, x, site, segments)
    rows, features = x.shape
    if x.dtype != y.dtype or y.shape != (rows, site.slice_starts[-1]):
        raise ValueError(f"lora_delta: y {tuple(y.shape)} {y.dtype} does not go with x {x.dtype}")
    if features != site.a.shape[2]:
        raise ValueError(f"lora_delta: x has {features} features, the site {site.a.shape[2]}")
    handle = holding if rows <= HOLD_ROWS else releasing
    if handle.loramux_lora_delta(
        *(address, _segments(segments), x.data_ptr(), x_stride, y.data_ptr(), y_stride),
        *(rows, dtype, torch.get_num_threads()),
    ):
        raise ValueError("lora_delta: a segment points outside the tokens or the pool")
    return None


def _delta_in_turn(y: torch.Tensor, x: torch.Tensor, site: LoRASite, segments: Segments) -> None:
    """`lora_delta` where some adapters have gains and shifts, which come after the deltas before them:
    member by member."""
    if "turns" not in segments.notes:
        segments.notes["turns"] = list(_turns(segments))
    for one, start, end, p in segments.notes["turns"]:
        lora_delta(y, x, site, one)
        if p is not None:
            gain, shift = reference.gain_and_shift(site, p, y.dtype)  # [N] each
            rows = y[start:end]  # [t, N]
            rows += rows * gain + shift


def _turns(segments: Segments) -> Iterator[tuple[Segments, int, int, int | None]]:
    """Segments of one member each, their rows, and the pool row of a member with gains and shifts."""
    offsets, rows = segments.member_offsets.tolist(), segments.member_rows.tolist()
    spans = zip(segments.starts.tolist(), segments.ends.tolist(), strict=True)
    for g, (start, end) in enumerate(spans):
        for m in range(offsets[g], offsets[g + 1] if start < end else offsets[g]):
            one = Segments(
                starts=segments.starts[g : g + 1],  # [1]
                ends=segments.ends[g : g + 1],  # [1]
                member_offsets=torch.tensor([0, 1], dtype=torch.int32),  # [2]
                member_rows=segments.member_rows[m : m + 1],  # [1]
                member_scales=segments.member_scales[m : m + 1],  # [1]
                num_segments=1,
            )
            yield one, start, end, rows[m] if rows[m] in segments.affine_rows else None


def _is_paged(cache: torch.Tensor) -> bool:
    """Whether a cache [num_blocks, block_size, Hkv, D] is contiguous within each block."""
    heads, dim = cache.shape[2:]
    return cache.stride()[1:] == (heads * dim, dim, 1) or cache[0].is_contiguous()


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """See `loramux.kernels.write_kv`."""
    tokens, heads, _ = k.shape
    _, size, cache_heads, k_dim = k_cache.shape
    v_dim, width = v_cache.shape[3], k.dtype.itemsize
    k_strides, v_strides = k.stride(), v.stride()
    plain = k_strides[2] == 1 and v_strides[2] == 1 and slots.is_contiguous()
    if not (plain and _is_paged(k_cache) and _is_paged(v_cache) and k.dtype == k_cache.dtype):
        return reference.write_kv(k, v, k_cache, v_cache, slots)
    expected = ((tokens, cache_heads, k_dim), (tokens, cache_heads, v_dim), (tokens,))
    if (k.shape, v.shape, slots.shape) != expected or slots.dtype != torch.int64:
        raise ValueError(f"write_kv: k {tuple(k.shape)}, v {tuple(v.shape)} do not fit the cache")
    if holding.loramux_write_kv(
        *(k.data_ptr(), k_strides[0] * width, k_strides[1] * width),
        *(k_cache.data_ptr(), k_cache.stride(0) * width, k_dim * width),
        *(v.data_ptr(), v_strides[0] * width, v_strides[1] * width),
        *(v_cache.data_ptr(), v_cache.stride(0) * width, v_dim * width),
        *(slots.data_ptr(), tokens, heads, size, min(k_cache.shape[0], v_cache.shape[0])),
    ):
        raise ValueError("write_kv: a slot lies outside the cache")
    return None


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
    """See `loramux.kernels.paged_attention`; long chunks go to `cpu_prefill`."""
    dtype = DTYPES.get(q.dtype)
    plain = q.stride(2) == 1 and k_cache.dtype == q.dtype == v_cache.dtype
    if dtype is None or not (plain and _is_paged(k_cache) and _is_paged(v_cache)):
        return reference.paged_attention(
            q, k_cache, v_cache, batch, scaling, window, softcap, sinks
        )
    if sinks is not None:
        _check_sinks(sinks, q.shape[1])
    short, long, covered = _split(batch, k_cache.shape[1])
    tokens, heads, dim = q.shape
    out = q.new_empty(tokens, heads, v_cache.shape[3])  # [T, H, Dv]
    if covered < tokens:
        out[covered:] = 0
    by_products = softcap == 0 and (sinks is None or dim == v_cache.shape[3])
    chosen = short if by_products else short + long
    if chosen:
        _attend(q, k_cache, v_cache, out, batch, chosen, (scaling, window, softcap, dtype), sinks)
    if by_products:
        for i in long:
            cpu_prefill.attend(q, k_cache, v_cache, out, batch, i, scaling, window, sinks)
    return out


def _check_sinks(sinks: torch.Tensor, heads: int) -> None:
    plain = sinks.dtype == torch.float32 and sinks.is_contiguous() and sinks.is_cpu
    if sinks.shape != (heads,) or not plain:
        raise ValueError(f"paged_attention: sinks must be {heads} contiguous float32 on the CPU")


def _check_last_keys(last_keys: torch.Tensor, rows: int) -> None:
    plain = last_keys.dtype == torch.int32 and last_keys.is_contiguous() and last_keys.is_cpu
    if last_keys.dim() != 1 or last_keys.shape[0] < rows or not plain:
        raise ValueError(f"AttentionBatch: last_keys must be {rows} contiguous int32 on the CPU")


def _split(batch: AttentionBatch, block_size: int) -> tuple[list[int], list[int], int]:
    """Sequences of few queries, those of many, and the number of query rows they cover."""
    if "cpu" not in batch.notes:
        starts = batch.query_starts
        counts = [end - start for start, end in pairwise(starts)]
        if starts[0] != 0 or len(batch.context_lens) != len(counts):
            raise ValueError("AttentionBatch: query_starts must be Q+1 offsets from 0")
        tables = batch.block_tables
        if max(batch.context_lens, default=0) > tables.shape[1] * block_size:
            raise ValueError("AttentionBatch: a context is longer than its block table")
        for tensor in (tables, batch.query_starts_tensor, batch.context_lens_tensor):
            if tensor.dtype != torch.int32 or tensor.stride(-1) != 1 or not tensor.is_cpu:
                raise ValueError("AttentionBatch: tensors must be int32 on the CPU")
        if batch.last_keys is not None:
            _check_last_keys(batch.last_keys, starts[-1])
        short = [i for i, count in enumerate(counts) if 0 < count < LONG_CHUNK]
        long = [i for i, count in enumerate(counts) if count >= LONG_CHUNK]
        batch.notes["cpu"] = (short, long, starts[-1])
    split: tuple[list[int], list[int], int] = batch.notes["cpu"]
    return split


def _attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    batch: AttentionBatch,
    chosen: list[int],
    rest: tuple[float, int, float, int],
    sinks: torch.Tensor | None,
) -> None:
    """Fill `out` [T, H, Dv] for `chosen` sequences; rest: scaling, window, softcap, dtype."""
    notes, key = batch.notes, f"cpu {len(chosen)}"
    if key not in notes:
        notes[key] = (ctypes.c_int32 * len(chosen))(*chosen)
    scaling, window, softcap, dtype = rest
    _, size, kv_heads, dim = k_cache.shape
    tables, (q_token, q_head, _) = batch.block_tables, q.stride()
    struct = _Attention(
        *(q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr()),
        *(tables.data_ptr(), batch.query_starts_tensor.data_ptr()),
        *(batch.context_lens_tensor.data_ptr(), ctypes.addressof(notes[key])),
        *(None if t is None else t.data_ptr() for t in (sinks, batch.last_keys)),
        *(len(chosen), tables.stride(0), q_token, q_head, k_cache.stride(0), v_cache.stride(0)),
        *(q.shape[1], kv_heads, dim, v_cache.shape[3], size, window, dtype),
        *(torch.get_num_threads(), k_cache.shape[0], scaling, softcap),
    )
    if releasing.loramux_attention(ctypes.addressof(struct)):
        raise ValueError("paged_attention: a block table points outside the cache")


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
    """See `loramux.kernels.rope_kv`."""
    if expand is not None or slots.dtype != torch.int64:
        return reference.rope_kv(
            qkv, table, positions, slots, k_cache, v_cache, heads, norms, eps, mode, expand
        )
    kv_heads, size = k_cache.shape[2], k_cache.shape[3]
    rows = qkv.view(qkv.shape[0], heads + 2 * kv_heads, size)  # [T, H + 2 Hkv, D]
    q, k = rows[:, :heads], rows[:, heads : heads + kv_heads]
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps, mode), rms_norm(k, norms[1], eps, mode)
    angles = table[positions]  # [T, rot]
    half = table.shape[1] // 2
    cos, sin = angles[:, :half], angles[:, half:]
    rope(q, k, torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1))
    write_kv(k, rows[:, heads + kv_heads :], k_cache, v_cache, slots)
    return q  # [T, H, D]
