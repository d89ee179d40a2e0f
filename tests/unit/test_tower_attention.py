"""Attention in segments, against each segment alone in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from loramux.models import tower_attention
from loramux.models.tower_attention import attend, segments_function


def wanted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """[T, H, D], one segment after the other."""
    parts = []
    for start, end in pairwise(cuts):
        a, b, c = (t[start:end].double().transpose(0, 1) for t in (q, k, v))  # [H, L, D]
        weights = torch.softmax(a @ b.transpose(1, 2) * q.shape[-1] ** -0.5, -1)  # [H, L, L]
        parts.append((weights @ c).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_attend_to_themselves(dtype: torch.dtype, device: str) -> None:
    lengths = [*torch.randint(1, 40, (9,)).tolist(), 16, 16, 16]
    cuts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    q, k, v = (torch.randn(cuts[-1], 3, 16, dtype=dtype) for _ in range(3))
    there = [t.to(device) for t in (q, k, v)]
    starts = torch.tensor(cuts, dtype=torch.int32, device=device)
    out = attend(*there, starts, 16**-0.5).cpu()
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), wanted(q, k, v, cuts), atol=bound, rtol=bound)


def test_the_scale_is_the_callers() -> None:
    q, k, v = (torch.randn(5, 2, 8) for _ in range(3))
    starts = torch.tensor([0, 5], dtype=torch.int32)
    once = attend(q, k, v, starts, 0.7)
    torch.testing.assert_close(once, attend(q * 0.7 * 8**0.5, k, v, starts, None))
    given = [t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)]  # [1, H, T, D] each
    out, _ = segments_function(torch.nn.Identity(), *given, None, 0.7, cu_seq_lens_q=starts)
    torch.testing.assert_close(out[0], once)


def test_the_name_asks_for_all_segments_at_once() -> None:
    """transformers tells by the name."""
    from transformers.utils.generic import is_flash_attention_requested

    name = tower_attention.SEGMENTS_NAME
    assert is_flash_attention_requested(requested_attention_implementation=name)
