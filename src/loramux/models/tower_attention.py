"""Attention of encoders in which each image, window or sound attends to itself alone.

transformers cuts such a step into its segments and calls attention for each of them: a hundred times a
layer for one image in windows. A name with `flash` in it is given all of them at once instead, which is
how those encoders are entered here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

SEGMENTS_NAME = "loramux_flash_segments"
KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_5_omni_thinker")
"""`model_type`s whose encoders ask for it."""


def attend_in_segments(model: PreTrainedModel, inside: PreTrainedModel) -> None:
    """Let the encoders of `model`, all that is not in its language model `inside`, attend so."""
    if model.config.model_type not in KINDS:
        return
    AttentionInterface.register(SEGMENTS_NAME, segments_function)
    own = {id(module) for module in inside.modules()}
    for module in model.modules():
        if module is model or id(module) in own or not isinstance(module, PreTrainedModel):
            continue
        if inside not in module.modules():
            # By the configuration: the setter would look for the flash-attention package.
            module.config._attn_implementation_internal = SEGMENTS_NAME


def segments_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """All [1, H, T, D] -> [1, T, H, D]. Segment i begins at token `cu_seq_lens_q[i]` and ends where the
    next one begins."""
    assert cu_seq_lens_q is not None and attention_mask is None, "no segments. This is a bug."
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, H, D] each
    out = attend(q, k, v, cu_seq_lens_q, scaling, max_length_q)  # [T, H, D]
    return out.unsqueeze(0), None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    scaling: float | None,
    longest: int | None = None,
) -> torch.Tensor:
    """Each token of q, k, v [T, H, D] over its segment, cut by `starts` [S + 1] int32 -> [T, H, D]."""
    if _is_for_varlen(q):
        from torch.nn.attention.varlen import varlen_attn

        most = int((starts[1:] - starts[:-1]).max()) if longest is None else longest
        cuts = starts.int()
        usual = scaling is None or abs(scaling * q.shape[-1] ** 0.5 - 1) < 1e-6
        more: dict[str, Any] = {} if usual else {"scale": scaling}  # torch 2.11 may not know it
        out: Any = varlen_attn(
            *(q.contiguous(), k.contiguous(), v.contiguous(), cuts, cuts, most, most), **more
        )  # [T, H, D]
        attended: torch.Tensor = out
        return attended
    return _attend_by_length(q, k, v, starts, scaling)  # [T, H, D]


def _is_for_varlen(q: torch.Tensor) -> bool:
    """Whether torch's kernel takes these."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256


def _attend_by_length(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Segments of one length together."""
    cuts = starts.long().cpu()  # [S + 1]
    lengths = cuts[1:] - cuts[:-1]  # [S]
    out = torch.empty_like(q)  # [T, H, D]
    for length in lengths.unique().tolist():
        firsts = cuts[:-1][lengths == length]  # [N]
        rows = (firsts.unsqueeze(1) + torch.arange(length)).to(q.device)  # [N, L]
        a, b, c = (t[rows].transpose(1, 2) for t in (q, k, v))  # [N, H, L, D] each
        attended = F.scaled_dot_product_attention(a, b, c, scale=scaling)  # [N, H, L, D]
        out[rows] = attended.transpose(1, 2)
    return out
