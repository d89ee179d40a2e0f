"""One row times a weight in Triton, on the GPU or in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, assert_close

from loramux.kernels import reference

gemv = pytest.importorskip("loramux.kernels.triton_gemv")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (64, 16), (576, 33), (2048, 8), (4099, 7)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_row(dtype: torch.dtype, inputs: int, outputs: int, bias: bool, device: str) -> None:
    x = torch.randn(1, inputs, dtype=dtype, device=device)
    whole = torch.randn(outputs + 4, inputs, dtype=dtype, device=device)
    weight = whole[2 : 2 + outputs]
    added = torch.randn(outputs, dtype=dtype, device=device) if bias else None
    ours = gemv.linear(x, weight, added)
    wide = None if added is None else added.double()
    assert ours.shape == (1, outputs) and ours.dtype == dtype
    theirs = reference.linear(x.double(), weight.double(), wide)
    assert_close(ours.cpu(), theirs.cpu(), floor=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_place_for_the_result(rows: int, bias: bool, device: str) -> None:
    """Columns of something wider, of which the others keep what they have."""
    x, weight = torch.randn(rows, 40, device=device), torch.randn(24, 40, device=device)
    added = torch.randn(24, device=device) if bias else None
    wide = torch.full((rows, 40), 7.0, device=device)
    out = gemv.linear(x, weight, added, wide[:, :24])
    assert out.data_ptr() == wide.data_ptr()
    torch.testing.assert_close(wide[:, :24], reference.linear(x, weight, added))
    assert bool((wide[:, 24:] == 7).all())


@pytest.mark.parametrize("rows", [0, 2, 5])
def test_other_counts_go_to_the_library(rows: int, device: str) -> None:
    x = torch.randn(rows, 40, device=device)
    weight = torch.randn(24, 40, device=device)
    assert torch.equal(gemv.linear(x, weight, None), reference.linear(x, weight, None))


def test_a_row_and_a_weight_with_strides(device: str) -> None:
    """Neither is read as if it were contiguous."""
    x = torch.randn(1, 80, device=device)[:, ::2]
    weight = torch.randn(24, 80, device=device)
    for taken in (weight[:, ::2], weight[:, :40], weight[::2, 40:]):
        ours = gemv.linear(x, taken, None)
        torch.testing.assert_close(ours, x @ taken.T)
        torch.testing.assert_close(gemv.linear(x.contiguous(), taken, None), ours)
