"""Sampling against plain definitions, and draws that do not depend on the batch."""

from __future__ import annotations

import math

import pytest
import torch

from loramux.engine.plan import SampleSpec
from loramux.engine.sampler import sample
from loramux.types import SamplingParams

V = 50


def _logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def _spec(seed: int = 0, position: int = 0, **params: object) -> SampleSpec:
    extras = {k: params.pop(k) for k in ("stop_ids", "prompt_ids", "output_ids") if k in params}
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


def test_neighbours_with_other_windows_change_nothing() -> None:
    logits = torch.randn(3, 3000, generator=torch.Generator().manual_seed(5))
    spec = _spec(11, 3, temperature=1.0, top_k=7)
    alone = sample(logits[:1], [spec])[0].token_id
    others = [spec, _spec(1, temperature=9.0, top_p=0.99), _spec(2, temperature=1.0, top_k=2500)]
    assert sample(logits, others)[0].token_id == alone
