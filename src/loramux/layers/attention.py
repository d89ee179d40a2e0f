"""Attention over the paged KV cache, behind transformers' registered attention function.

Models' own masks never come here: each is None, and the step says what a row sees. It is causal but in
Gemma 3 (`create_masks_for_vision_model` of transformers 5.17), where a run of image tokens sees itself
whole. In full layers k <= q or k is in q's run; in sliding ones that and k > q - window, so even an
image longer than the window is seen forward to its end. Tags stand between images, so a run is one of
them. Prompts without images and generated tokens are causal. `AttentionBatch.last_keys` says it.
"""

from __future__ import annotations

from typing import Any

import torch

from loramux.errors import UnsupportedModel
from loramux.kernels import paged_attention, write_kv
from loramux.layers.batch import StepBatch

AttentionKind = tuple[float, int, float]
"""(scaling, window, softcap) of a layer's attention; 0 switches window and softcap off."""


class PagedAttention:
    """One layer's part of the cache: K [blocks, block_size, Hkv, D] and V [..., Dv]."""

    def __init__(self, batch: StepBatch, layer: int):
        self.layer = layer
        self.key_shape: tuple[int, int] | None = None  # (Hkv, D), seen in the probe
        self.value_shape: tuple[int, int] | None = None
        self.kind: AttentionKind = (0.0, 0, 0.0)  # seen in the probe
        self.num_heads = 0  # likewise
        self.sinks: torch.Tensor | None = None  # likewise; [H] float32
        self.calls = 0  # without a cache; in the probe, one a layer
        self.k_cache: torch.Tensor | None = None
        self.v_cache: torch.Tensor | None = None
        self._batch = batch

    def allocate(self, num_blocks: int, block_size: int, dtype: torch.dtype, device: str) -> None:
        """Make the cache. On a CPU memory is only taken as blocks are first written."""
        # Unwritten blocks may hold NaN, which a masked product on a GPU would spread.
        make = torch.zeros if torch.device(device).type == "cuda" else torch.empty
        assert self.key_shape is not None and self.value_shape is not None, "probe first"
        keys = (num_blocks, block_size, *self.key_shape)
        values = (num_blocks, block_size, *self.value_shape)
        self.k_cache = make(keys, dtype=dtype, device=device)
        self.v_cache = make(values, dtype=dtype, device=device)

    def free(self) -> None:
        """Give the cache back."""
        self.k_cache = self.v_cache = None

    def attend(self, q: torch.Tensor) -> torch.Tensor:
        """q [T, H, D] over what the cache holds of the step's sequences -> [T, H, Dv]."""
        attention = self._batch.attention
        if self.k_cache is None or self.v_cache is None:
            return q.new_zeros(q.shape[0], q.shape[1], self.value_shape[1])  # type: ignore[index]
        assert attention is not None, "attention outside a step. This is a bug."
        return paged_attention(
            q, self.k_cache, self.v_cache, attention, *self.kind, self.sinks
        )  # [T, H, Dv]

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scaling: float,
        window: int,
        softcap: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q [1, H, T, D], k and v [1, Hkv, T, D], sinks [H] -> [1, T, H, Dv]."""
        q, k, v = (t.squeeze(0).transpose(0, 1) for t in (q, k, v))  # [T, H, D]
        if self.k_cache is None or self.v_cache is None:
            self.kind = (scaling, window, softcap)
            self.sinks = None if sinks is None else sinks.detach().float().contiguous()  # [H]
            return self._probe(q, k, v)
        slots, attention = self._batch.slots, self._batch.attention
        assert slots is not None and attention is not None, (
            "attention outside a step. This is a bug."
        )
        write_kv(k, v, self.k_cache, self.v_cache, slots)
        out = paged_attention(
            q, self.k_cache, self.v_cache, attention, scaling, window, softcap, self.sinks
        )  # [T, H, Dv]
        return out.unsqueeze(0)  # [1, T, H, Dv]

    def _probe(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Before there is a cache: learn the shapes; the values do not matter."""
        self.key_shape = (k.shape[1], k.shape[2])
        self.value_shape = (v.shape[1], v.shape[2])
        self.num_heads = q.shape[1]
        self.calls += 1
        return q.new_zeros(1, q.shape[0], q.shape[1], v.shape[2])  # [1, T, H, Dv]


# Arguments that change the result and that the paged kernels do not know.
_UNKNOWN_EXTRAS = ("position_bias", "alibi", "head_mask", "indices")


def attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **extras: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for `attn_implementation="loramux_paged"`.

    `module.loramux_attention` is the layer's PagedAttention, put there when the model was attached.
    """
    attention: PagedAttention = module.loramux_attention  # type: ignore[assignment]
    extra = [name for name in _UNKNOWN_EXTRAS if extras.get(name) is not None]
    if attention_mask is not None:
        extra.append("attention_mask")
    if s_aux is not None and not _are_sinks(s_aux, query.shape[1]):
        extra.append("s_aux other than a parameter with one value a head")
    if extra:
        raise UnsupportedModel(
            f"{type(module).__name__} needs {', '.join(extra)} in its attention, which is not served yet"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(query, key, value, scale, sliding_window or 0, softcap or 0.0, s_aux), None


def _are_sinks(s_aux: torch.Tensor, heads: int) -> bool:
    """Whether what the probe is given holds for every step."""
    return isinstance(s_aux, torch.nn.Parameter) and s_aux.shape == (heads,)
