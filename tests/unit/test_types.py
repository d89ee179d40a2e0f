"""Sampling settings refuse what cannot be served; compositions have one form."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.errors import InvalidField
from loramux.types import AdapterUse, SamplingParams, compose

MEMBERS = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([-1.0, 0.5, 1.0, 2.0])))


@given(MEMBERS, st.randoms())
def test_composition_does_not_depend_on_order(members: list[tuple[str, float]], rng: Any) -> None:
    shuffled = list(members)
    rng.shuffle(shuffled)
    composition = compose(members)
    assert compose(shuffled) == composition
    assert len({digest for digest, _ in composition}) == len(composition)
    assert all(scale != 0 for _, scale in composition)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("logprobs", 21),
        ("stop", ""),
        ("stop_token_ids", [-1]),
        ("logit_bias", {3: math.nan}),
    ],
)
def test_bad_values_name_their_field(name: str, value: Any) -> None:
    if (name, value) == ("stop", ""):
        value = ["a", ""]
    with pytest.raises(InvalidField) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name


def test_vllm_spellings() -> None:
    params = SamplingParams(stop="x", stop_token_ids=[3], logit_bias={5: 1}, top_k=-1)
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("x",), (3,), ((5, 1.0),))


def test_adapter_scale_must_be_finite() -> None:
    with pytest.raises(InvalidField, match="finite"):
        AdapterUse("a", math.inf)
    with pytest.raises(InvalidField, match="name"):
        AdapterUse("")
