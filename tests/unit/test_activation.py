"""Where activated adapters begin, what that makes of rows and of the keys of blocks."""

from __future__ import annotations

import itertools
import logging
import pickle
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.variants import calculate_alora_offsets

from loramux.engine.activation import (
    composed,
    inside_media,
    members_of_row,
    not_invoked,
    start_of,
    starts_of,
    until_second,
)
from loramux.engine.link import content_of
from loramux.engine.packing import Capacity, PackedStep, active_runs, fill, runs_of
from loramux.engine.plan import CHOSEN_ELSEWHERE, Row, SampleSpec, StepPlan
from loramux.engine.rows import make_row
from loramux.engine.sequence import Sequence, answers_of
from loramux.engine.singles import Limits, single_tokens
from loramux.types import AdapterRef, MediaItem, Request, SamplingParams

BLOCK = 4


def ref(name: str, *invocation: int) -> AdapterRef:
    return AdapterRef(name, name, "", 4, 1, invocation=invocation)


def sequence_of(
    prompt: list[int], adapters: list[tuple[AdapterRef, float]], number: int = 0
) -> Sequence:
    starts = starts_of([r for r, _ in adapters], prompt)
    params = SamplingParams(max_tokens=9)
    request = Request(str(number), tuple(prompt), params, tuple(adapters), starts=starts)
    return Sequence(number, request, 0, 0, queued_at=0.0)


@settings(max_examples=300, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 2), min_size=1, max_size=30),
    invocation=st.lists(st.integers(0, 2), min_size=1, max_size=4),
)
def test_the_start_is_where_peft_finds_it(prompt: list[int], invocation: list[int]) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=invocation)
    (offset,) = calculate_alora_offsets({"x": config}, "x", torch.tensor([prompt]))
    assert start_of(invocation, prompt) == (None if offset is None else len(prompt) - offset)
    assert start_of((), prompt) == 0


def test_a_hostile_search_takes_linear_time() -> None:
    begun = time.perf_counter()
    prompt = [7] * 500_000
    assert start_of([7, 8, *[7] * 400], prompt) is None
    assert start_of([7] * 200 + [8] + [7] * 200, prompt) is None
    assert time.perf_counter() - begun < 5


def test_those_that_do_not_apply_are_left_out() -> None:
    plain, a, b = ref("p"), ref("a", 5), ref("b", 6, 6)
    prompt = [1, 6, 6, 6, 2, 5, 3]
    request = Request("r", tuple(prompt), SamplingParams(), ((b, 0.5), (a, 2.0), (plain, 1.0)))
    assert composed(request)[1] == (0, 0, 0)
    sequence = sequence_of(prompt, [(b, 0.5), (a, 2.0), (plain, 1.0)])
    assert sequence.composition == (("p", 1.0), ("b", 0.5), ("a", 2.0))
    assert sequence.starts == (0, 2, 5)
    sequence = sequence_of([1, 2], [(b, 0.5), (a, 2.0), (plain, 1.0)])
    assert (sequence.composition, sequence.starts) == ((("p", 1.0),), (0,))
    assert sequence.digests == ("p",)
    assert not_invoked([plain, a, b], [6, 6]) == [a]
    assert not_invoked([plain], [1]) == []
    doubled = sequence_of([5, 5], [(a, 2.0), (a, -0.5)])
    assert (doubled.composition, doubled.starts) == ((("a", 1.5),), (1,))


def test_every_answer_of_a_request_begins_where_the_first_does() -> None:
    a = ref("a", 5)
    starts = starts_of([a], [1, 5, 2])
    params = SamplingParams(n=3)
    request = Request("r", (1, 5, 2), params, ((a, 1.0),), starts=starts)
    answers = answers_of(request, random.Random(1), itertools.count())
    assert [(s.starts, s.last_start, s.composition) for s in answers] == [
        ((1,), 1, (("a", 1.0),))
    ] * 3


def test_an_invocation_amid_media_is_found() -> None:
    items = [MediaItem("image", "i", ((2, 5),), {}), MediaItem("audio", "s", ((8, 9),), {})]
    assert inside_media((None, 0, 5, 8), items) == (3, items[1])
    assert inside_media((2,), items) == (0, items[0])
    assert inside_media((0, 1, 5, 7, 9, None), items) is None
    assert inside_media((0,), [MediaItem("image", "i", ((0, 3),), {})]) is None


ADAPTERS = [ref("p"), ref("q"), ref("a", 1), ref("b", 2), ref("c", 1, 2)]
ASKED = st.lists(
    st.tuples(st.sampled_from(ADAPTERS), st.sampled_from([0.5, 1.0])),
    max_size=3,
    unique_by=lambda x: x[0].name,
)


def at(sequence: Sequence, place: int) -> frozenset[tuple[str, float]]:
    """What applies to a token."""
    return frozenset(
        m for m, start in zip(sequence.composition, sequence.starts, strict=True) if start <= place
    )


@settings(max_examples=400, deadline=None)
@given(
    text=st.lists(st.integers(0, 2), min_size=4, max_size=14),
    asked=st.lists(
        st.tuples(st.integers(4, 14), st.integers(0, 14), ASKED), min_size=2, max_size=8
    ),
)
def test_keys_are_equal_exactly_where_all_that_was_computed_is(text, asked) -> None:
    computed: dict[bytes, object] = {}
    known: dict[object, bytes] = {}
    for length, other, adapters in asked:
        prompt = text[:length]
        if other < len(prompt):
            prompt[other] = 1
        sequence = sequence_of(prompt, adapters)
        sequence.update_keys(BLOCK)
        assert len(sequence.keys) == len(prompt) // BLOCK
        for index, key in enumerate(sequence.keys):
            done = tuple((prompt[p], at(sequence, p)) for p in range((index + 1) * BLOCK))
            assert computed.setdefault(key, done) == done
            assert known.setdefault(done, key) == key


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 2), min_size=1, max_size=20), asked=ASKED, cut=st.integers(1, 9)
)
def test_rows_have_the_members_of_their_tokens(prompt, asked, cut: int) -> None:
    sequence = sequence_of(prompt, asked)
    pool = {digest: 8 * i for i, digest in enumerate(sequence.digests)}
    sequence.members = tuple((pool[d], scale) for d, scale in sequence.composition)
    while sequence.num_computed < len(prompt):
        begun = sequence.num_computed
        count = sequence.in_one_row(begun, min(cut, len(prompt) - begun))
        row = make_row(sequence, count)
        found = [members for size, members in row.parts() for _ in range(size)]
        for place, members in enumerate(found, begun):
            assert set(members) == {(pool[d], s) for d, s in at(sequence, place)}
        assert len(found) == count and len(row.parts()) == len(set(row.parts())) <= 2
        inner = {s for s in sequence.starts if begun < s < begun + min(cut, len(prompt) - begun)}
        assert count == min(cut, len(prompt) - begun) or len(inner) > 1
        assert pickle.loads(pickle.dumps(row)) == row
        sequence.num_computed += count


def test_a_row_ends_where_a_second_adapter_begins() -> None:
    starts = (0, 5, 5, 9, 12)
    assert until_second(starts, 0, 20) == 9
    assert until_second(starts, 0, 7) == 7
    assert until_second(starts, 5, 20) == 7
    assert until_second(starts, 9, 20) == until_second((), 9, 20) == 20
    members = tuple((i, 1.0) for i in range(5))
    assert members_of_row(members, starts, 0, 9) == (members[:3], (5, members[:1]))
    assert members_of_row(members, starts, 5, 9) == (members[:3], None)
    assert members_of_row(members, starts, 0, 5) == (members[:1], None)


SPEC = SampleSpec(SamplingParams(), seed=0, position=0)
A, B = ((8, 1.0),), ((8, 1.0), (16, 0.5))
ROWS = [
    Row(0, (1, 2), 0, (0,), (), SPEC),
    Row(1, (3, 4, 5, 6), 0, (1,), A, SPEC, before=(3, ())),
    Row(2, (7, 8), 0, (2,), A, None),
    Row(3, (9, 10, 11), 1, (3,), B, SPEC, before=(1, A)),
]


def test_runs_are_cut_where_an_adapter_begins() -> None:
    runs = runs_of(ROWS)
    wanted = [(0, 5, ()), (5, 9, A), (9, 11, B)]
    assert [(run.start, run.end, run.members) for run in runs] == wanted
    assert active_runs(runs) == 2
    scattered = [ROWS[1], Row(4, (1, 2), 0, (4,), A, None, before=(1, ()))]
    assert active_runs(runs_of(scattered)) == 3  # base, A, base, A: chunks of four runs
    packed = PackedStep(Capacity(16, 8, 8, 32), torch.device("cpu"))
    host = packed.next_host()
    shape = fill(
        *(packed, host, ROWS, BLOCK),
        previous={},
        columns={A: [0], B: [0, 4]},
        ranks={8: 4, 16: 4},
        rows_per_chunk=4,
    )
    chunks = packed.arrays(host)["chunks"][: 8 * shape.chunks].reshape(-1, 8)[:, :4]
    assert chunks.tolist() == [[0, 4, 0, 0], [4, 5, 0, 0], [5, 9, 0, 1], [9, 11, 1, 3]]
    assert packed.arrays(host)["counts"].tolist() == [2, 4]
    assert np.allclose(packed.arrays(host)["member_scales"][:3], [1.0, 1.0, 0.5])


def test_single_tokens_have_the_members_of_their_place() -> None:
    singles = single_tokens(ROWS, BLOCK, Limits(100, 1000, 1000))
    assert singles is not None
    assert [row.members for row in singles] == [*[()] * 5, *[A] * 4, *[B] * 2]
    assert all(row.before is None for row in singles)
    assert runs_of(singles) == runs_of(ROWS)


def test_other_ranks_are_told_where_an_adapter_begins() -> None:
    plan = StepPlan(tuple(ROWS), (), ("image",), (7,))
    told = pickle.loads(content_of(plan.for_others())).plan()
    chosen = [row.sample and CHOSEN_ELSEWHERE for row in ROWS]
    wanted = [row._replace(sample=sample) for row, sample in zip(ROWS, chosen, strict=True)]
    assert told == replace(plan, rows=tuple(wanted))
    assert told.rows[1].sample is CHOSEN_ELSEWHERE


def test_the_log_says_once_what_was_not_invoked(caplog: pytest.LogCaptureFixture) -> None:
    from loramux.engine.admission import Admission

    admission = Admission.__new__(Admission)
    admission._warned = set()
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        for name, starts in (("a", (None,)), ("b", (0,))):
            admission._warn_of(
                Request("r", (1,), SamplingParams(), ((ref(name, 5), 1.0),), starts=starts)
            )
    (record,) = caplog.records
    assert "'a' was not invoked" in record.getMessage() and "[5]" in record.getMessage()
