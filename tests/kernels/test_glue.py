"""Norms, activation and rotation: float64 for the value, Hugging Face's chain for the rounding."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, assert_close, strided

from loramux.kernels import NormMode
from loramux.kernels.dispatch import Backend

MODES: tuple[NormMode, ...] = ("llama", "plain", "gemma")
# The chains round in between: so many roundings, each of one step, may add up.
CHAIN = 3.0


def norm_oracle(x: torch.Tensor, weight: torch.Tensor, eps: float, mode: str) -> torch.Tensor:
    wide = x.double()
    factor = weight.double() + (1.0 if mode == "gemma" else 0.0)
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * factor


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [7, 64, 576])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(ops: Backend, dtype: torch.dtype, size: int, mode: NormMode) -> None:
    weight = torch.randn(size).to(dtype)
    for x in (strided(9, size, dtype=dtype), torch.randn(2, 3, size).to(dtype)):
        out = ops.rms_norm(x, weight, 1e-5, mode)
        assert out.is_contiguous() and out.dtype == dtype
        assert_close(out, norm_oracle(x, weight, 1e-5, mode), CHAIN)
    heads = strided(300, 4, size, dtype=dtype)
    assert_close(ops.rms_norm(heads, weight, 1e-6, mode), norm_oracle(heads, weight, 1e-6, mode), 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm(ops: Backend, dtype: torch.dtype, mode: NormMode) -> None:
    x, residual = strided(300, 500, dtype=dtype), strided(300, 500, dtype=dtype)
    weight, before = torch.randn(500).to(dtype), residual.clone()
    out, total = ops.add_rms_norm(x, residual, weight, 1e-5, mode)
    assert torch.equal(total, residual + x)
    assert torch.equal(residual, before)
    assert_close(out, norm_oracle(total, weight, 1e-5, mode), CHAIN)


def test_norm_of_mixed_dtypes_follows_hugging_face(ops: Backend) -> None:
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8)
    assert ops.rms_norm(x, weight, 1e-5).dtype == torch.float32
    assert ops.rms_norm(x, weight, 1e-5, "gemma").dtype == torch.bfloat16


@pytest.mark.parametrize("rows, size", [(1, 1), (5, 100), (200, 1536)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul(ops: Backend, dtype: torch.dtype, rows: int, size: int) -> None:
    both = strided(rows, 2 * size, dtype=dtype) * 4
    gate, up = both[:, :size], both[:, size:]
    gate[0, 0] = -200.0
    out = ops.silu_mul(gate, up)
    assert out.is_contiguous() and out.dtype == dtype
    assert_close(out, gate.double() / (1 + (-gate.double()).exp()) * up.double(), CHAIN)


@pytest.mark.parametrize("rotated", [64, 48, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope(ops: Backend, dtype: torch.dtype, rotated: int) -> None:
    merged = strided(70, (9 + 3) * 64, dtype=dtype)
    q, k = merged[:, : 9 * 64].view(70, 9, 64), merged[:, 9 * 64 :].view(70, 3, 64)
    angles = torch.rand(70, rotated // 2) * 6
    cos, sin = (f(torch.cat((angles, angles), -1)).to(dtype) for f in (torch.cos, torch.sin))
    wanted = []
    for heads in (q, k):
        wide, half = heads.double().clone(), rotated // 2
        lo, hi = wide[..., :half].clone(), wide[..., half:rotated].clone()
        c, s = cos.double()[:, None, :half], sin.double()[:, None, :half]
        wide[..., :half], wide[..., half:rotated] = lo * c - hi * s, hi * c + lo * s
        wanted.append(wide)
    ops.rope(q, k, cos, sin)
    for heads, right in zip((q, k), wanted, strict=True):
        # A difference of two rounded products: the error goes with them, not with the result.
        assert_close(heads, right, CHAIN, floor=4 * torch.finfo(dtype).eps + 4e-6)
        assert torch.equal(heads[..., rotated:].double(), right[..., rotated:])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_glue_rounds_where_the_twin_rounds(ops: Backend, dtype: torch.dtype) -> None:
    """Beside the rare tie that float32 sums decide differently, the bits are Hugging Face's."""
    from loramux.kernels import reference

    x, weight = torch.randn(64, 576).to(dtype), torch.randn(576).to(dtype)
    pairs = [(ops.silu_mul(x, x.flip(0)), reference.silu_mul(x, x.flip(0)))]
    for mode in MODES:
        pairs.append(
            (ops.rms_norm(x, weight, 1e-5, mode), reference.rms_norm(x, weight, 1e-5, mode))
        )
    for ours, theirs in pairs:
        assert (ours != theirs).double().mean() < 2e-3
