"""What is remembered of a launch: never the code that Triton made for other arguments."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from work_lists import make_case

from loramux.kernels.triton_delta import Lora, packed
from loramux.kernels.triton_launch import cdiv, facts_of, next_power_of_2
from loramux.kernels.triton_norm import rms_norm

BUFFER = torch.zeros(64)
VALUES: list[Any] = [
    *(0, 1, 2, 15, 16, 17, 48, -16, -1, 2**31 - 1, 2**31, 2**31 + 16, 2**40 + 1, -(2**31) - 1),
    *(None, True, False, 0.5, 1.0),
    *(BUFFER, BUFFER[1:], BUFFER[4:], BUFFER.int(), BUFFER.bfloat16(), BUFFER.bfloat16()[1:]),
    torch.nn.Parameter(torch.zeros(3)),
    *((1, BUFFER), (2, BUFFER), (16, BUFFER[1:]), (BUFFER, 2), (BUFFER, (2, None))),
]


def _by_triton(value: Any) -> Any:
    """What Triton compiles code for."""
    native = pytest.importorskip("triton._C.libtriton")
    backend = pytest.importorskip("triton.backends.nvidia.compiler").CUDABackend
    if not hasattr(native, "native_specialize_impl"):
        pytest.skip("this Triton looks at arguments in another way")
    return native.native_specialize_impl(backend, value, False, True, True)


def test_values_that_triton_tells_apart_have_other_facts() -> None:
    for one, other in itertools.combinations(VALUES, 2):
        if _by_triton(one) != _by_triton(other):
            assert facts_of((one,)) != facts_of((other,)), (one, other)


def test_values_of_the_same_kind_share_their_facts() -> None:
    """Or there would be an entry for every number of tokens."""
    assert len({facts_of((count, 0.1 * count, BUFFER)) for count in range(2, 5000)}) <= 16
    assert facts_of((torch.zeros(8),)) == facts_of((torch.zeros(9),))


def test_a_step_and_a_site_are_looked_at_once_and_h_always() -> None:
    case = make_case((0, 16), [(0, 4)], [(0, 4, [0])], 4)
    site, work = case.site, case.work
    one, other = (packed(site, h, work) for h in (BUFFER.view(2, 4, 8), BUFFER[1:33].view(2, 4, 4)))
    assert site.notes["gpu"].facts is one.facts[1] is other.facts[1]
    assert work.notes["gpu"].facts is one.facts[2]
    assert one.facts != other.facts
    assert isinstance(other.value, Lora) and other.value.h_width == 4
    assert other.value.b is site.b and other.value.chunks is work.chunks


def test_what_is_replaced_is_looked_at_anew() -> None:
    case = make_case((0, 16), [(0, 4)], [(0, 4, [0])], 4)
    packed(case.site, BUFFER.view(2, 4, 8), case.work)
    site, work = replace(case.site, b=case.site.b.clone()), replace(case.work, affine=True)
    assert not site.notes and not work.notes
    assert packed(site, BUFFER.view(2, 4, 8), work).value.b is site.b


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 63, 64, 65, 4096])
def test_sizes(count: int) -> None:
    assert next_power_of_2(count) // 2 < count <= next_power_of_2(count)
    assert cdiv(count, 4) * 4 >= count > (cdiv(count, 4) - 1) * 4


@pytest.mark.gpu
def test_pointers_that_16_does_not_divide_after_one_that_it_does() -> None:
    weight = torch.ones(64, device="cuda")
    numbers = torch.randn(65 * 64, device="cuda")
    for start in (0, 1, 0, 2, 1):
        x = numbers[start : start + 64 * 64].view(64, 64)
        expected = torch.nn.functional.rms_norm(x, (64,), weight, 1e-5)
        torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected)
