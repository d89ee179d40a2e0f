"""Sampling on CUDA: what the CPU chooses, at the size of a real vocabulary, and never waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from loramux.engine.adjust import adjust
from loramux.engine.plan import SampleSpec
from loramux.engine.sampler import Sampler
from loramux.types import SamplingParams

pytestmark = pytest.mark.gpu
V = 128256
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _logits(rows: int, size: int = V, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(rows, size, generator=torch.Generator().manual_seed(rows)) * 3).to(dtype)


def _spec(seed: int = 0, position: int = 0, **params: Any) -> SampleSpec:
    names = ("stop_ids", "prompt_ids", "output_ids", "pending")
    extras = {name: params.pop(name) for name in names if name in params}
    return SampleSpec(SamplingParams(**params), seed, position, **extras)


def _mixed() -> list[SampleSpec]:
    penalised: dict[str, Any] = {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "prompt_ids": tuple(range(500)),
        "output_ids": (7, 7, 9, 1000),
    }
    return [
        _spec(temperature=0.0),
        _spec(1, 2, temperature=1.5),
        _spec(2, 3, top_p=0.9, logprobs=5),
        _spec(3, 4, top_k=50),
        _spec(4, 5, min_p=0.05, top_k=2000, top_p=0.8),
        _spec(temperature=0.0, pending=True, logprobs=0, **penalised),
        _spec(5, 6, pending=True, top_p=0.7, **penalised),
        _spec(6, 7, logit_bias={5: 3.0, 90: -4.0}, stop_ids=(2, 3), logprobs=20),
    ]


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_greedy_logprobs_and_penalties_are_the_cpus(dtype: torch.dtype) -> None:
    logits = _logits(8, 5000, dtype)
    before = torch.arange(8) + 5
    params = [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0, "top_k": 1}]
    specs = []
    for row in range(8):
        common = {**params[row % 4], "pending": row > 3, "logprobs": row}
        first = logits[row].topk(3).indices.tolist()
        more: dict[str, Any] = {"prompt_ids": (first[0],), "repetition_penalty": 1.4}
        if row % 2:
            more |= {
                "output_ids": (first[1], 8, 8),
                "frequency_penalty": 1.5,
                "presence_penalty": 1,
            }
        specs.append(_spec(row, row, **common, **more, stop_ids=(first[2],), logit_bias={4: 1.0}))
    wanted = Sampler(CPU).choose(logits, specs, before).read()
    found = Sampler(CUDA).choose(logits.to(CUDA), specs, before.to(CUDA)).read()
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.logprobs is not None and theirs.logprobs is not None
        assert ours.logprobs.chosen.rank == theirs.logprobs.chosen.rank
        values = [t.logprob for t in (ours.logprobs.chosen, *ours.logprobs.top)]
        others = [t.logprob for t in (theirs.logprobs.chosen, *theirs.logprobs.top)]
        assert values == pytest.approx(others, abs=1e-4)
    on_cuda, on_cpu = adjust(logits.to(CUDA), specs, before.to(CUDA)), adjust(logits, specs, before)
    assert on_cuda is not None and on_cpu is not None and on_cuda.rows == on_cpu.rows
    torch.testing.assert_close(on_cuda.logits.cpu(), on_cpu.logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "cut",
    [
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": 5000},
        {"top_p": 0.1},
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 2.0},
        {"top_k": 40, "top_p": 0.9},
        {"min_p": 0.02, "top_p": 0.8},
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_cuts_are_the_definition_at_full_size(cut: dict[str, Any], dtype: torch.dtype) -> None:
    from loramux.kernels import triton_sampling as kernels

    logits = _logits(4, V, dtype)
    temperature = cut.get("temperature", 1.0)
    scaled = logits.double() / temperature  # [N, V]
    if "min_p" in cut:
        floor = scaled.amax(-1, keepdim=True) + torch.tensor(cut["min_p"]).double().log()
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    values, order = scaled.sort(dim=-1, descending=True, stable=True)  # [N, V] each
    place = torch.arange(V)
    values = values.masked_fill(place >= cut.get("top_k", V), -torch.inf)
    p = values.softmax(-1)  # [N, V]
    left = ((p.cumsum(-1) - p < cut.get("top_p", 1.0)) & (p > 0)).sum(-1)  # [N]

    draws = [kernels.Draw(i, i, 0, 0, **{"temperature": 1.0, **cut}) for i in range(4)]
    settings = torch.from_numpy(kernels.pack(draws, V)).to(CUDA)  # [C, D]
    on_cuda = logits.to(CUDA)
    kernels.cut(on_cuda, settings, on_cuda.argmax(-1))
    threshold, last = settings[[kernels.THRESHOLD.value, kernels.LAST.value]].cpu()  # [D] each
    bits = logits.float().view(torch.int32)  # [N, V]
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # [N, V]
    equal = (ordered == threshold.unsqueeze(-1)) & (place <= last.unsqueeze(-1))
    kept = ((ordered > threshold.unsqueeze(-1)) | equal) & scaled.isfinite()  # [N, V]
    # Sums of float32 may take one token more or less at the edge of a wide nucleus.
    slack = 0 if "top_p" not in cut else left.double() * 2e-4
    assert bool(((kept.sum(-1) - left).abs() <= slack).all())
    for row in range(4):
        sure = order[row, : int(left[row] * 0.999)]
        assert bool(kept[row, sure].all())


def test_choosing_never_waits() -> None:
    logits, before = _logits(8).to(CUDA), torch.arange(8, device=CUDA)
    sampler, specs = Sampler(CUDA), _mixed()
    first = sampler.choose(logits, specs, before)  # compiles
    greedy = [_spec(temperature=0.0)] * 8
    sampler.choose(logits, greedy)
    with _waiting_is_an_error():
        again = sampler.choose(logits, specs, before)
        sampler.choose(logits, specs, again.tokens, greedy=logits.argmax(-1))
        plain = sampler.choose(logits, greedy, greedy=again.tokens)
    assert again.read() == first.read()
    assert [c.token_id for c in plain.read()] == [c.token_id for c in first.read()]


def test_a_choice_is_read_before_later_work_ends() -> None:
    logits = _logits(8).to(CUDA)
    kept = logits.clone()
    sampler, specs, before = Sampler(CUDA), _mixed(), torch.arange(8, device=CUDA)
    wanted = sampler.choose(logits, specs, before).read()
    assert torch.equal(logits, kept)
    greedy = logits.argmax(-1)
    torch.cuda.synchronize()
    choice = sampler.choose(logits, specs, before, greedy=greedy)
    torch.cuda._sleep(2_000_000_000)  # about a second
    logits.fill_(1.0)  # as the next step of a captured graph does
    greedy.zero_()
    end = torch.cuda.Event()
    end.record()
    assert choice.read() == wanted
    assert not end.query()
    torch.cuda.synchronize()
    assert choice.tokens.tolist() == [c.token_id for c in wanted]


def test_rows_are_as_alone() -> None:
    logits, before = _logits(8).to(CUDA), torch.arange(8, device=CUDA) + 400
    sampler, specs = Sampler(CUDA), _mixed()
    together = [c.token_id for c in sampler.choose(logits, specs, before).read()]
    for row, spec in enumerate(specs):
        alone = sampler.choose(logits[row : row + 1], [spec], before[row : row + 1]).read()[0]
        assert alone.token_id == together[row]


def test_draws_follow_the_distribution() -> None:
    logits = torch.full((1, V), -torch.inf)
    places = torch.tensor([0, 5, 4096, 70000, V - 1])
    logits[0, places] = torch.tensor([0.0, 1.0, 0.5, -1.0, 0.8])
    rows = logits.to(CUDA).expand(256, V)
    sampler = Sampler(CUDA)
    counts = torch.zeros(V)
    for position in range(40):
        specs = [_spec(seed, position) for seed in range(256)]
        counts += torch.bincount(sampler.choose(rows, specs).tokens.cpu(), minlength=V)
    expected = logits[0, places].softmax(-1) * 40 * 256  # [5]
    assert int(counts[places].sum()) == 40 * 256
    # 4 degrees of freedom, one of 1000 cases
    assert float(((counts[places] - expected) ** 2 / expected).sum()) < 18.5
