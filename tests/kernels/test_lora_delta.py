"""`lora_delta` against dense float64 weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    NAN,
    assert_close,
    int32,
    lora_oracle,
    make_segments,
    make_site,
    strided,
)

from loramux.kernels import LoRASite, Segments, lora_delta
from loramux.kernels.dispatch import Backend

ADAPTERS = [(2, 1), (5, 3), (9, 17), (30, 16)]
SPANS = [(1, 2, [2]), (2, 5, [5, 9]), (5, 5, [30]), (6, 47, [30, 2, 9]), (47, 120, [5])]


def check(ops: Backend, y: torch.Tensor, x: torch.Tensor, site: LoRASite, spans: Segments) -> None:
    """The delta is right, and rows in no segment keep their bits."""
    wanted, before = lora_oracle(y, x, site, spans), y.clone()
    ops.lora_delta(y, x, site, spans)
    base = torch.ones(len(y), dtype=torch.bool)
    for start, end in zip(spans.starts.tolist(), spans.ends.tolist(), strict=True):
        base[start:end] = False
    assert torch.equal(y[base].view(torch.uint8), before[base].view(torch.uint8))
    assert_close(y[~base], wanted[~base], floor=2e-5)


@pytest.mark.parametrize("weights", DTYPES, ids=str)
@pytest.mark.parametrize("activations", DTYPES, ids=str)
def test_every_pair_of_dtypes(ops: Backend, activations: torch.dtype, weights: torch.dtype) -> None:
    site = make_site((0, 48, 64, 101), 75, ADAPTERS, weights, untouched=((1, 9), (0, 30)))
    x, y = strided(123, 75, dtype=activations), strided(123, 101, dtype=activations)
    x[0], x[121:] = NAN, NAN
    y[0] = NAN
    check(ops, y, x, site, make_segments(SPANS))


@pytest.mark.parametrize("features, width", [(1, 1), (16, 128), (33, 300), (576, 960)])
def test_sizes(ops: Backend, features: int, width: int) -> None:
    site = make_site((0, width), features, ADAPTERS, torch.bfloat16)
    x, y = torch.randn(120, features).bfloat16(), torch.randn(120, width).bfloat16()
    check(ops, y, x, site, make_segments(SPANS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gains_and_shifts_come_in_turn(ops: Backend, dtype: torch.dtype) -> None:
    site = make_site((0, 48, 64, 101), 75, ADAPTERS, dtype, untouched=((1, 9),))
    affine = torch.full((2, site.b.shape[0], 101), NAN).to(dtype)
    affine[:, [2, 9]] = torch.randn(2, 2, 101).to(dtype)
    site = replace(site, affine=affine, place_rows=1)
    spans = replace(make_segments(SPANS), affine_rows=frozenset({2, 9}))
    x, y = torch.randn(123, 75).to(dtype), torch.randn(123, 101).to(dtype)
    wanted, before = lora_oracle(y, x, site, spans), y.clone()
    ops.lora_delta(y, x, site, spans)
    assert torch.equal(y[[0, 120]], before[[0, 120]])
    # Each member's sum is rounded before the next one's gain.
    error = (y.double() - wanted).abs().max() / wanted.abs().max()
    assert error < (1e-6 if dtype == torch.float32 else 2e-2)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_work_list(ops: Backend, data: st.DataObject) -> None:
    rows = [p for p, _ in ADAPTERS]
    members = st.lists(st.sampled_from(rows), max_size=3)
    spans, token = [], 0
    for gap, size in data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)))):
        spans.append((token + gap, token + gap + size, data.draw(members)))
        token += gap + size
    cuts = sorted(data.draw(st.lists(st.integers(0, 70), max_size=3)))
    untouched = data.draw(st.sets(st.tuples(st.integers(0, 3), st.sampled_from(rows))))
    site = make_site((0, *cuts, 70), 20, ADAPTERS, torch.float32, untouched=tuple(untouched))
    x, y = torch.randn(token + 1, 20), torch.randn(token + 1, 70)
    check(ops, y, x, site, make_segments(spans))


def test_same_result_alone_and_in_a_crowd(ops: Backend) -> None:
    """A token's bits do not depend on who else is in the step."""
    site = make_site((0, 200), 96, ADAPTERS, torch.bfloat16)
    x, y = torch.randn(9, 96).bfloat16(), torch.randn(9, 200).bfloat16()
    together, alone = y.clone(), y.clone()
    spans = [(0, 4, [2]), (4, 5, [9, 5]), (5, 9, [30])]
    crowd = make_segments(spans)
    ops.lora_delta(together, x, site, crowd)
    for g, (start, end, rows) in enumerate(spans):
        one = make_segments([(start, end, rows)])
        lo, hi = int(crowd.member_offsets[g]), int(crowd.member_offsets[g + 1])
        one.member_scales.copy_(crowd.member_scales[lo:hi])
        ops.lora_delta(alone, x, site, one)
    assert torch.equal(together, alone)


def test_weights_may_change_in_place(ops: Backend) -> None:
    site = make_site((0, 8), 8, [(0, 2)], torch.float32)
    spans, x = make_segments([(0, 3, [0])]), torch.randn(3, 8)
    check(ops, torch.randn(3, 8), x, site, spans)
    site.a.copy_(torch.randn_like(site.a))
    site.row_scale[0, 0] = 3.0
    check(ops, torch.randn(3, 8), x, site, spans)


def test_no_segment_means_no_look_at_anything() -> None:
    empty = torch.empty(0)
    site = make_site((0, 4), 4, [(0, 1)], torch.float32)
    lora_delta(empty, empty, site, Segments(empty, empty, empty, empty, empty, 0))


@pytest.mark.parametrize(
    "field, value",
    [("starts", [-1]), ("ends", [9]), ("member_rows", [-1]), ("member_rows", [400])],
)
def test_a_list_that_points_outside_is_refused(field: str, value: list[int]) -> None:
    site = make_site((0, 4), 4, [(0, 1)], torch.float32)
    spans = make_segments([(0, 3, [0])])
    getattr(spans, field).copy_(int32(value))
    y = torch.zeros(3, 4)
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        pytest.importorskip("loramux.kernels.cpu").lora_delta(y, torch.ones(3, 4), site, spans)
    assert not y.any()


def test_site_checks_its_tensors() -> None:
    good = make_site((0, 4), 4, [(0, 1)], torch.float32)
    with pytest.raises(ValueError, match="row_r"):
        LoRASite(good.a, good.b, (0, 4), good.row_r.long(), good.row_scale)
    with pytest.raises(ValueError, match="slice_starts"):
        LoRASite(good.a, good.b, (1, 4), good.row_r, good.row_scale)
