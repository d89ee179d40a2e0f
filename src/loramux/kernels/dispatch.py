"""The ops as the layers call them: each looks up the implementation for its tensors' device."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch

from loramux.kernels import reference
from loramux.kernels.arguments import (
    Activation,
    AttentionBatch,
    Expand,
    LoRASite,
    NormMode,
    Routing,
    Segments,
    WorkList,
)

OPS = (
    "lora_delta",
    "lora_shrink",
    "lora_expand",
    "write_kv",
    "paged_attention",
    "rms_norm",
    "add_rms_norm",
    "silu_mul",
    "rope",
    "gated",
    "rope_kv",
    "take_tokens",
    "route",
    "take_rows",
    "combine",
    "grouped_linear",
)


class Backend(Protocol):
    """What a module of implementations provides; `reference` says what each op means."""

    def lora_delta(
        self, y: torch.Tensor, x: torch.Tensor, site: LoRASite, segments: Segments, /
    ) -> None: ...

    def lora_shrink(
        self,
        x: torch.Tensor,
        site: LoRASite,
        work: WorkList,
        h: torch.Tensor,
        order: torch.Tensor | None = None,
        top_k: int = 1,
        /,
    ) -> None: ...

    def lora_expand(self, y: torch.Tensor, expand: Expand, /) -> None: ...

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots: torch.Tensor,
        /,
    ) -> None: ...

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: AttentionBatch,
        scaling: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        /,
    ) -> torch.Tensor: ...

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, mode: NormMode = "llama", /
    ) -> torch.Tensor: ...

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        mode: NormMode = "llama",
        post_weight: torch.Tensor | None = None,
        expand: Expand | None = None,
        /,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor, /) -> torch.Tensor: ...

    def rope(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, /
    ) -> None: ...

    def gated(
        self,
        gate_up: torch.Tensor,
        activation: Activation = "silu",
        expand: Expand | None = None,
        /,
    ) -> torch.Tensor: ...

    def rope_kv(
        self,
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
        /,
    ) -> torch.Tensor: ...

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None = None,
        /,
    ) -> torch.Tensor: ...

    def take_tokens(
        self, ids: torch.Tensor, sources: torch.Tensor, chosen: torch.Tensor, /
    ) -> torch.Tensor: ...

    def route(
        self,
        chosen: torch.Tensor,
        num_experts: int,
        work: WorkList | None,
        rows_per_expert: int,
        /,
    ) -> Routing: ...

    def take_rows(self, x: torch.Tensor, order: torch.Tensor, top_k: int, /) -> torch.Tensor: ...

    def combine(
        self, y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, /
    ) -> torch.Tensor: ...

    def grouped_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        ends: torch.Tensor,
        expand: Expand | None = None,
        /,
    ) -> torch.Tensor: ...


@cache
def backend(device: torch.device) -> Backend:
    """The best implementation for `device`; the twins where there is no better one."""
    if device.type == "cpu":
        try:
            from loramux.kernels import cpu
        except ImportError:
            return reference
        return cpu
    if device.type == "cuda":
        try:
            from loramux.kernels import cuda
        except ImportError:  # no Triton
            return reference
        return cuda
    return reference


def lora_delta(y: torch.Tensor, x: torch.Tensor, site: LoRASite, segments: Segments) -> None:
    """Add to `y` [T, N] in place, for every token in a segment, the sum over its members of
    member_scale * row_scale[s, p] * (x[t] @ a[s, p:p+r]^T) @ b[p:p+r, columns of s].

    `x` [T, in] and `y` have one dtype and any row stride; rows in no segment keep their bits.
    """
    if segments.num_segments:
        backend(y.device).lora_delta(y, x, site, segments)


def lora_shrink(
    x: torch.Tensor,
    site: LoRASite,
    work: WorkList,
    h: torch.Tensor,
    order: torch.Tensor | None = None,
    top_k: int = 1,
) -> None:
    """Fill the columns of `h` [P, T, W] that the rows' members own with parts of x [T, in] @ A^T.

    `x` is rounded to the dtype of `site.a` first. What the P parts are is the implementation's
    affair, their sum is not; other columns are not written. See `Expand.h` for the columns. With
    `order` [S] int32 row i of `h` [P, S, W] is that of row order[i] // top_k of `x`."""
    backend(x.device).lora_shrink(x, site, work, h, order, top_k)


def lora_expand(y: torch.Tensor, expand: Expand) -> None:
    """Add the deltas of `expand` to `y` [T, N] (any row stride) in place."""
    backend(y.device).lora_expand(y, expand)


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Store `k` [T, Hkv, D], `v` [T, Hkv, Dv] (last dim contiguous) at `slots` [T] int64 of the
    caches [num_blocks, block_size, Hkv, D or Dv]; slot = block * block_size + offset."""
    backend(k.device).write_kv(k, v, k_cache, v_cache, slots)


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
    """Causal attention of `q` [T, H, D] over cached positions -> [T, H, Dv]; rows of
    `batch.last_keys` see further.

    `window` > 0: only the last `window` positions, the query's own included. `softcap` > 0:
    scores s become softcap * tanh(s / softcap). `sinks` [H] float32, contiguous: the softmax of
    head h has one score more, sinks[h], whose value is zero. Head h reads KV head h // (H // Hkv).
    """
    return backend(q.device).paged_attention(
        q, k_cache, v_cache, batch, scaling, window, softcap, sinks
    )


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, mode: NormMode = "llama"
) -> torch.Tensor:
    """RMS norm over the last dim: `x` [..., D], `weight` [D] -> [..., D]."""
    return backend(x.device).rms_norm(x, weight, eps, mode)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    mode: NormMode = "llama",
    post_weight: torch.Tensor | None = None,
    expand: Expand | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` (any row stride), `residual` [T, D] -> (rms_norm(residual + x), residual + x).

    `expand` is added to `x` first; with `post_weight` [D], x is then rms_norm(x) by that weight."""
    return backend(x.device).add_rms_norm(x, residual, weight, eps, mode, post_weight, expand)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(`gate`) * `up`: [T, I], [T, I] (any row stride) -> [T, I]."""
    return backend(gate.device).silu_mul(gate, up)


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate `q` [T, H, D] and `k` [T, Hkv, D] in place by `cos`, `sin` [T, rot], rot <= D."""
    backend(q.device).rope(q, k, cos, sin)


def gated(
    gate_up: torch.Tensor, activation: Activation = "silu", expand: Expand | None = None
) -> torch.Tensor:
    """activation(gate) * up of `gate_up` [T, 2 I] (any row stride), gate first -> [T, I]."""
    return backend(gate_up.device).gated(gate_up, activation, expand)


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
    """Queries [T, H, D] out of `qkv` [T, (H + 2 Hkv) D] (any row stride), rotated; the rotated keys
    and the values go to `slots` [T] of the caches [num_blocks, block_size, Hkv, D], -1 to none.

    `table` [P, rot] holds cos of the rot/2 frequencies, then sin, for each position; `positions` [T]
    int32. The first rot features of a head turn (rotate_half), the others stay. `norms` (q, k) [D]
    are applied to each head before. The order is: `expand`, norms, rotation."""
    return backend(qkv.device).rope_kv(
        qkv, table, positions, slots, k_cache, v_cache, heads, norms, eps, mode, expand
    )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x` [T, K] times `weight` [N, K] transposed, plus `bias` [N] -> [T, N], in `out` (any row stride)
    if that is given."""
    return backend(x.device).linear(x, weight, bias, out)


def take_tokens(ids: torch.Tensor, sources: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """`ids` [T] int32, or where `sources` [T] int32 >= 0 chosen[source] (int64) -> [T] int64."""
    return backend(ids.device).take_tokens(ids, sources, chosen)


def route(
    chosen: torch.Tensor, num_experts: int, work: WorkList | None, rows_per_expert: int
) -> Routing:
    """The order in which the experts `chosen` [T, K] (int32 or int64) are computed.

    `work` says what adapters the T tokens take; tokens in none of its chunks take none. Rank row k
    of expert e is row e * `rows_per_expert` + k of the pool, see `LoRASite.experts`."""
    return backend(chosen.device).route(chosen, num_experts, work, rows_per_expert)


def take_rows(x: torch.Tensor, order: torch.Tensor, top_k: int) -> torch.Tensor:
    """The rows of `x` [T, H] (any row stride) that the pairs `order` [S] belong to -> [S, H]."""
    return backend(x.device).take_rows(x, order, top_k)


def combine(y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sums over k of weights[t, k] * y[places[t * K + k]]: `y` [S, H] (any row stride),
    `weights` [T, K] (any dtype and strides) -> [T, H], rounded once to the dtype of `y`."""
    return backend(y.device).combine(y, places, weights)


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, expand: Expand | None = None
) -> torch.Tensor:
    """`x` [S, in] times the transposed `weight` [E, out, in] of each row's expert, plus the deltas of
    `expand`, whose work is a `Routing`'s -> [S, out].

    Expert e has the rows from ends[e - 1] (or 0) to ends[e] - 1; the last of `ends` [E] is S."""
    return backend(x.device).grouped_linear(x, weight, ends, expand)


def shrink_parts(tokens: int, features: int, chunks: int) -> int:
    """P of the `h` that `lora_shrink` fills fastest for so many tokens, features and chunks."""
    if tokens > 512:
        return 1
    return max(1, min(16, features // 512 if chunks < 64 else features // 1024))
