"""What DoRA and trained biases do to the output of a layer: a gain and a shift.

DoRA gives the weights of every output feature a length that was trained, m (Liu et al., "DoRA:
Weight-Decomposed Low-Rank Adaptation", 2024; PEFT's `lora_magnitude_vector`):

    g = m / |W + s B A|         y = g (W x + s B A x) + bias

A layer that has put out W x + bias and the delta so becomes that by y + y * gain + shift with

    gain = g - 1                shift = b' - g b + s b_B

where b' is the trained bias of the layer (b, if it has none) and b_B the bias of lora_B.
"""

from __future__ import annotations

import torch

from loramux.adapters.weights import Stored, StoredVectors

CHUNK_ELEMENTS = 1 << 24  # of a weight that is looked at at a time, in float32


def squared_lengths(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """Of the rows of `weight` [out, in] + scale * b [out, r] @ a [r, in], in float32: [out]."""
    device = weight.device
    a, b = a.to(device).float(), b.to(device).float() * scale
    step = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    found = [
        (weight[low : low + step].float() + b[low : low + step] @ a).square().sum(1)
        for low in range(0, weight.shape[0], step)
    ]
    return torch.cat(found)  # [out]


def gain_and_shift(
    stored: StoredVectors,
    buffer: torch.Tensor,
    squares: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Gain and shift [2, out] float32; all vectors are [out]."""

    def vector(kind: Stored | None) -> torch.Tensor | None:
        return None if kind is None else kind.view(buffer).view(-1).float()  # [out]

    magnitude, own, lora_bias = map(vector, (stored.magnitude, stored.bias, stored.lora_bias))
    gain = torch.zeros_like(bias) if magnitude is None else magnitude / squares.sqrt() - 1
    shift = (bias if own is None else own) - (1 + gain) * bias
    if lora_bias is not None:
        shift = shift + scale * lora_bias
    return torch.stack((gain, shift))  # [2, out]
