"""A step with short prompts as a step of single tokens."""

from __future__ import annotations

import random

from loramux.engine.plan import PENDING, Row, SampleSpec
from loramux.engine.singles import LONGEST_WHOLE, Limits, single_tokens
from loramux.types import SamplingParams

SAMPLE = SampleSpec(SamplingParams(temperature=0), seed=0, position=0)
BLOCK = 4


def row(number: int, count: int, start: int = 0, sample: SampleSpec | None = SAMPLE) -> Row:
    blocks = tuple(range(100 * number, 100 * number + -(-(start + count) // BLOCK)))
    members = ((16 * number, 0.5),) if number % 2 else ()
    return Row(number, tuple(range(count)), start, blocks, members, sample)


def limits(tokens: int, positions: int, cut: int = 1000) -> Limits:
    return Limits(tokens, positions, cut)


def test_limits_are_those_of_the_graphs() -> None:
    assert Limits.of([], 8, 1024) == Limits(0, 1 << 19, 0), "nothing is captured"
    assert Limits.of([1, 8, 64], 16, 1024) == Limits(64, 1 << 19, 8)
    assert Limits.of([512], 256, 1 << 20) == Limits(512, 40 << 10, 0)


def test_decodes_are_left_alone() -> None:
    rows = [row(0, 1, 9), Row(1, (PENDING,), 7, (1, 2), (), SAMPLE)]
    assert single_tokens(rows, BLOCK, limits(2, 0)) is rows
    assert single_tokens(rows, BLOCK, limits(1, 0)) is None
    assert single_tokens([], BLOCK, limits(2, 0)) == []


def test_every_token_stands_where_it_stood() -> None:
    rng = random.Random(3)
    rows = [row(i, rng.randint(1, 9), rng.randint(0, 20)) for i in range(12)]
    rows += [row(12, 5, 3, sample=None)]
    singles = single_tokens(rows, BLOCK, limits(200, 10_000))
    assert singles is not None and all(len(single.token_ids) == 1 for single in singles)
    place = 0
    for whole in rows:
        for offset, token in enumerate(whole.token_ids):
            single, position = singles[place], whole.start + offset
            assert (single.sequence_id, single.token_ids) == (whole.sequence_id, (token,))
            assert (single.start, single.members) == (position, whole.members)
            # The blocks of the positions up to its own, and no other.
            assert single.block_table == whole.block_table[: position // BLOCK + 1]
            last = offset == len(whole.token_ids) - 1
            assert single.sample is (whole.sample if last else None)
            place += 1
    assert place == len(singles)


def test_prompts_that_would_be_read_too_often_are_refused() -> None:
    rows = [row(0, 1, 50), row(1, 4, 10)]  # 11 + 12 + 13 + 14 positions; the decode's do not count
    assert single_tokens(rows, BLOCK, limits(5, 50)) is not None
    assert single_tokens(rows, BLOCK, limits(5, 49)) is None
    assert single_tokens(rows, BLOCK, limits(4, 50)) is None


def test_a_long_context_is_not_left_to_one_program() -> None:
    rows = [row(0, 1, LONGEST_WHOLE), row(1, 4)]
    assert single_tokens(rows, BLOCK, limits(5, 50, cut=5)) is not None
    assert single_tokens(rows, BLOCK, limits(5, 50, cut=4)) is None
    assert single_tokens(rows[1:], BLOCK, limits(5, 50, cut=3)) is not None
