"""Patterns of a configuration: PEFT's answer for every name, and an end to those that never end."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from loramux.adapters.peft_patterns import Matcher, PatternTable

PARTS = ["a", "b", "ab", "a_b", "0", "10", "experts", "gate_proj"]
NAMES = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join)
PATTERNS = st.one_of(
    NAMES,
    st.tuples(NAMES, st.sampled_from([".a", "a.", ".", ".b.", "a.b"])).map("".join),
    NAMES.map(lambda name: name.replace(".", r"\.")),
    NAMES.map(lambda name: f"^{name}"),
    NAMES.map(lambda name: f".*{name}"),
    st.sampled_from([r"\d+", r"a|b", r"(a|b).*", r".*\.gate_proj", r"[ab]_?b", "a$", "..b"]),
)


@settings(max_examples=1000, deadline=None)
@given(patterns=st.lists(PATTERNS, unique=True, max_size=6), name=NAMES)
def test_the_first_pattern_is_the_one_that_peft_takes(patterns: list[str], name: str) -> None:
    values = {pattern: float(index) for index, pattern in enumerate(patterns)}
    theirs = values.get(get_pattern_key(values.keys(), name), -1.0)
    assert PatternTable(values, Matcher()).value(name, -1.0) == theirs


def test_all_matches_together_have_a_limit() -> None:
    matcher = Matcher(left_s=0.3)
    slow = r"(([a-z._0-9])*)*\1\2\1#"
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        for index in range(1_000_000):
            matcher.fullmatch(slow, f"model.layers.{index}.self_attn.q_proj" * 3)
    assert time.monotonic() - begun < 30


def test_looking_up_counts_as_well() -> None:
    """No table, however odd, is searched for longer than the limit."""
    odd = {f"{'a' * (n % 90)}.{'b' * (n // 90)}": 1.0 for n in range(8000)}
    table = PatternTable(odd, Matcher(left_s=0.2))
    with pytest.raises(TimeoutError):
        for index in range(100_000):
            table.value(f"model.layers.{index}.mlp.experts.0.gate_proj" * 4, 0.0)
