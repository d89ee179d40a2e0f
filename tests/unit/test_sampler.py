"""Sampling against plain definitions, and draws that do not depend on the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from loramux.engine.plan import SampleSpec
from loramux.engine.sampler import Sampler, sample
from loramux.engine.transfer import upload
from loramux.types import SamplingParams

V = 50


def _logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def _spec(seed: int = 0, position: int = 0, **params: object) -> SampleSpec:
    names = ("stop_ids", "prompt_ids", "output_ids", "pending")
    extras = {k: params.pop(k) for k in names if k in params}
    return SampleSpec(SamplingParams(**params), seed, position, **extras)  # type: ignore[arg-type]


def _support(logits: torch.Tensor, draws: int = 400, **params: object) -> set[int]:
    return {sample(logits, [_spec(i, **params)])[0].token_id for i in range(draws)}


def test_greedy() -> None:
    logits = _logits(0, 5)
    chosen = sample(logits, [_spec(temperature=0.0)] * 5)
    assert [c.token_id for c in chosen] == logits.argmax(-1).tolist()
    assert chosen[0].logprobs is None


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]])
    n = 4000
    counts = [0, 0, 0]
    for i in range(n):
        counts[sample(logits, [_spec(i, temperature=1.0)])[0].token_id] += 1
    for count, p in zip(counts, [1 / 8, 2 / 8, 5 / 8], strict=True):
        assert abs(count / n - p) < 4 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("seed", range(3))
def test_top_k_top_p_min_p_supports(seed: int) -> None:
    logits = _logits(seed)
    p = logits[0].softmax(-1)
    order = p.argsort(descending=True)
    assert _support(logits, temperature=1.0, top_k=3) <= set(order[:3].tolist())
    mass = p[order].cumsum(0)
    nucleus = set(order[: int((mass < 0.6).sum()) + 1].tolist())
    assert _support(logits, temperature=1.0, top_p=0.6) <= nucleus
    assert _support(logits, temperature=1.0, min_p=0.2) <= set(
        torch.nonzero(p >= 0.2 * p.max()).flatten().tolist()
    )
    assert _support(logits, temperature=1.0, top_p=1e-9) == {int(order[0])}


def test_a_seeded_draw_is_the_same_in_every_batch() -> None:
    logits = _logits(1, 4)
    spec = _spec(42, 7, temperature=1.3, top_p=0.9)
    alone = sample(logits[2:3], [spec])[0].token_id
    others = [_spec(1, temperature=0.5), _spec(2, temperature=0.0), spec, _spec(3, min_p=0.1)]
    assert sample(logits, others)[2].token_id == alone
    draws = {sample(logits[2:3], [_spec(42, i, temperature=3.0)])[0].token_id for i in range(50)}
    assert len(draws) > 5


def test_penalties() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, 0.0]])
    spec = _spec(temperature=0.0, repetition_penalty=1.2, prompt_ids=(0,))
    assert sample(logits, [spec])[0].token_id == 1
    spec = _spec(temperature=0.0, presence_penalty=0.2, output_ids=(0,), prompt_ids=(3,))
    assert sample(logits, [spec])[0].token_id == 1
    spec = _spec(temperature=0.0, frequency_penalty=0.06, output_ids=(0, 0), prompt_ids=(3,))
    assert sample(logits, [spec])[0].token_id == 1
    spec = _spec(temperature=0.0, frequency_penalty=0.04, output_ids=(0, 0), prompt_ids=(3,))
    assert sample(logits, [spec])[0].token_id == 0
    assert logits.tolist()[0] == pytest.approx([2.0, 1.9, -1.0, 0.0])


def test_bias_and_forbidden_stops() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    assert sample(logits, [_spec(temperature=0.0, logit_bias={2: 5})])[0].token_id == 2
    assert sample(logits, [_spec(temperature=0.0, stop_ids=(0,))])[0].token_id == 1


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = _logits(3)
    chosen = sample(logits, [_spec(9, temperature=2.0, top_k=1, logprobs=3, logit_bias={4: 50})])[0]
    raw = logits[0].log_softmax(-1)
    assert chosen.token_id == 4 and chosen.logprobs is not None
    assert chosen.logprobs.chosen.logprob == pytest.approx(float(raw[4]), abs=1e-5)
    assert chosen.logprobs.chosen.rank == int((raw > raw[4]).sum()) + 1
    assert [t.token_id for t in chosen.logprobs.top] == raw.topk(3).indices.tolist()
    assert [t.rank for t in chosen.logprobs.top] == [1, 2, 3]


def test_a_flat_distribution_is_cut_right_beyond_the_window() -> None:
    size = 5000
    logits = torch.zeros(1, size)
    kept = int(size * 0.9)
    tokens = {
        sample(logits, [_spec(i, temperature=1.0, top_p=0.9)])[0].token_id for i in range(300)
    }
    order = logits[0].topk(size).indices[: kept + 1].tolist()
    assert tokens <= set(order) and len(tokens) > 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_with_other_windows_change_nothing(dtype: torch.dtype) -> None:
    """Not even which of equal logits, of which there are many in 16 bits, come first."""
    logits = torch.randn(3, 3000, generator=torch.Generator().manual_seed(5)).to(dtype)
    spec = _spec(11, 3, temperature=1.0, top_k=7)
    alone = sample(logits[:1], [spec])[0].token_id
    others = [spec, _spec(1, temperature=9.0, top_p=0.99), _spec(2, temperature=1.0, top_k=2500)]
    assert sample(logits, others)[0].token_id == alone
    for position in range(20):
        spec = _spec(3, position, temperature=0.5, top_p=0.9)
        alone = sample(logits[:1], [spec])[0].token_id
        assert sample(logits, [spec, *others[1:]])[0].token_id == alone


def _adjusted(logits: torch.Tensor, spec: SampleSpec, output: Sequence[int]) -> torch.Tensor:
    """One row [V] after penalties, bias and stops, token by token."""
    row, p = logits.double().clone(), spec.params
    for token in {*spec.prompt_ids, *output}:
        row[token] *= p.repetition_penalty if row[token] < 0 else 1 / p.repetition_penalty
    for token in set(output):
        row[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty
    for token, bias in p.logit_bias:
        row[token] += bias
    row[list(spec.stop_ids)] = -torch.inf
    return row


def _spread(logits: torch.Tensor, spec: SampleSpec, before: torch.Tensor | None) -> list[int]:
    """The likeliest tokens in their order, found by forbidding one after the other."""
    found: list[int] = []
    sampler = Sampler(torch.device("cpu"))
    for _ in range(logits.shape[-1]):
        stops = (*spec.stop_ids, *found)
        now = SampleSpec(
            spec.params, 0, 0, stops, spec.prompt_ids, spec.output_ids, pending=spec.pending
        )
        found += [c.token_id for c in sampler.choose(logits, [now], before).read()]
    return found


PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"frequency_penalty": 0.9},
    {"presence_penalty": -1.3},
    {"repetition_penalty": 0.6, "frequency_penalty": 0.7, "presence_penalty": 0.8},
    {"repetition_penalty": 1.3, "frequency_penalty": -0.5, "logit_bias": {3: 1.5, 7: -2.0}},
]


@pytest.mark.parametrize("params", PENALTIES)
@pytest.mark.parametrize("pending", [None, 4, 9, 2])  # none, an output, new, of the prompt
def test_a_pending_token_counts_as_the_last_output(
    params: dict[str, Any], pending: int | None
) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(8)) * 2
    prompt, output = (1, 2, 2, 6), (4, 4, 5, 1)
    spec = _spec(
        temperature=0.0, prompt_ids=prompt, output_ids=output, pending=pending is not None, **params
    )
    known = output if pending is None else (*output, pending)
    before = None if pending is None else torch.tensor([pending])
    wanted = _adjusted(logits[0], spec, known).argsort(descending=True).tolist()
    assert _spread(logits, spec, before) == wanted


def test_the_first_output_may_be_pending() -> None:
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    sampler = Sampler(torch.device("cpu"))
    spec = _spec(temperature=0.0, presence_penalty=0.2, pending=True)
    for token, wanted in ((0, 1), (2, 0)):
        assert sampler.choose(logits, [spec], torch.tensor([token])).read()[0].token_id == wanted
    with pytest.raises(ValueError, match="no tokens"):
        sampler.choose(logits, [spec])


def test_a_pending_token_without_penalties_is_not_looked_at() -> None:
    logits = _logits(4, 3)
    specs = [_spec(temperature=0.0, pending=True), _spec(5, 3, pending=True), _spec(5, 3)]
    chosen = Sampler(torch.device("cpu")).choose(logits, specs).read()
    assert chosen[0].token_id == int(logits[0].argmax())
    assert chosen[1] == sample(logits[1:2], [_spec(5, 3)])[0]


def test_rows_of_every_kind_side_by_side_are_as_alone() -> None:
    logits = _logits(6, 8)
    before = torch.arange(8) + 20
    specs = [
        _spec(temperature=0.0),
        _spec(1, 2, temperature=1.5, top_p=0.8, logprobs=4),
        _spec(temperature=0.0, stop_ids=(3, int(logits[2].argmax())), logprobs=0),
        _spec(4, 5, presence_penalty=1.1, output_ids=(3, 3, 9), pending=True),
        _spec(4, 5, repetition_penalty=1.4, prompt_ids=(1, 3), output_ids=(8,), logprobs=20),
        _spec(4, 5, frequency_penalty=2.0, pending=True, logit_bias={24: 5.0}, min_p=0.1),
        _spec(temperature=0.0, repetition_penalty=3.0, pending=True, top_k=4),
        _spec(8, 1, temperature=2.0, top_k=9),
    ]
    sampler = Sampler(torch.device("cpu"))
    kept = logits.clone()
    together = sampler.choose(logits, specs, before)
    greedy = logits.argmax(-1)
    given = sampler.choose(logits, specs, before, greedy=greedy)
    alone = [
        sampler.choose(logits[i : i + 1], [spec], before[i : i + 1]).read()[0]
        for i, spec in enumerate(specs)
    ]
    assert together.read() == alone == given.read() == together.read()
    assert together.tokens.tolist() == [c.token_id for c in alone]
    assert torch.equal(logits, kept) and torch.equal(greedy, logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_as_float32(dtype: torch.dtype) -> None:
    logits = _logits(9, 3).to(dtype)
    specs = [_spec(temperature=0.0, logprobs=2), _spec(3, 4, top_p=0.9), _spec(stop_ids=(1,))]
    chosen, wide = sample(logits, specs), sample(logits.float(), specs)
    assert [c.token_id for c in chosen] == [c.token_id for c in wide]
    assert chosen[0].logprobs == wide[0].logprobs


def test_logprobs_of_a_small_vocabulary() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    (chosen,) = sample(logits, [_spec(temperature=0.0, logprobs=20)])
    assert chosen.logprobs is not None
    assert [t.token_id for t in chosen.logprobs.top] == [2, 1, 0]


def test_arrays_travel_as_they_are() -> None:
    arrays = [
        np.arange(5, dtype=np.int64),
        np.zeros((0,), np.float32),
        np.array([[1.5, -2.0], [0.0, 7.0], [1e9, 3.0]], np.float32).T,
        np.array([-(2**31), 7], np.int32),
    ]
    for array, tensor in zip(arrays, upload(torch.device("cpu"), *arrays), strict=True):
        assert tensor.numpy().dtype == array.dtype and tensor.data_ptr() % 16 == 0
        assert np.array_equal(tensor.numpy(), array)
