"""The order in which experts are computed, in Triton (on the GPU or interpreted) and in torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from expert_cases import ROWS, Step, check_routing, choose, make_step, routing_to_cpu
from work_lists import make_work, work_to

from loramux.kernels import reference

triton_route = pytest.importorskip("loramux.kernels.triton_route")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _nothing_is_zero_by_chance() -> Iterator[None]:
    """New tensors are filled with the largest number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, dtype=torch.int32).all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["kernels", "twin"])
def route(request: pytest.FixtureRequest) -> Any:
    return triton_route.route if request.param == "kernels" else reference.route


def check(route: Any, chosen: torch.Tensor, experts: int, step: Step | None, device: str) -> None:
    work = None if step is None else work_to(step.work, device)
    routing = route(chosen.to(device), experts, work, ROWS)
    check_routing(routing_to_cpu(routing), chosen, experts, step)


@pytest.mark.parametrize(
    "tokens, top_k, experts, among",
    [
        (1, 1, 4, 0),
        (1, 8, 64, 0),
        (3, 2, 5, 0),
        (30, 1, 4, 1),  # all to one expert: chunks split
        (70, 3, 6, 3),  # three experts get all, three get nothing
        (40, 8, 8, 0),  # all experts get all
        (65, 4, 40, 0),
        (130, 2, 33, 9),
    ],
)
def test_random_steps(
    tokens: int, top_k: int, experts: int, among: int, route: Any, device: str
) -> None:
    check(route, choose(tokens, top_k, experts, among), experts, make_step(tokens), device)


def test_no_adapters_in_the_step(route: Any, device: str) -> None:
    check(route, choose(45, 3, 7), 7, None, device)


@pytest.mark.parametrize("spans", [[], [(0, 9, [])], [(0, 9, [5, 2])]], ids=str)
def test_one_composition(spans: list[Any], route: Any, device: str) -> None:
    work = make_work(spans, {5: 0, 2: 30}, {5: 3, 2: 1}, 8)
    members = (0, 2) if spans and spans[0][2] else (0, 0)
    check(route, choose(9, 2, 4), 4, Step([members] * 9, work), device)


def test_int32_and_strides(route: Any, device: str) -> None:
    wide = torch.full((20, 9), -1, dtype=torch.int32)
    wide[:, 1:7:2] = choose(20, 3, 12).int()
    chosen, step = wide.to(device)[:, 1:7:2], make_step(20)
    routing = route(chosen, 12, work_to(step.work, device), ROWS)
    check_routing(routing_to_cpu(routing), wide[:, 1:7:2], 12, step)


def test_chunks_of_any_size_and_more_than_a_program_looks_up_at_a_time(
    route: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_route, "CHUNKS", 16)
    check(route, choose(90, 2, 9), 9, make_step(90, rows_per_chunk=2), device)
    check(route, choose(90, 2, 9), 9, make_step(90, rows_per_chunk=64), device)


@pytest.mark.parametrize("tokens", [512, 513])
def test_many_pairs(tokens: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 pairs are the most that are counted, 4104 are sorted: larger chunks."""
    if device == "cpu":  # a program of the interpreter costs more than what it computes
        monkeypatch.setattr(triton_route, "PAIRS", 1024)
        monkeypatch.setattr(triton_route, "TOKENS", 512)
    step = make_step(tokens, rows_per_chunk=16)
    check(triton_route.route, choose(tokens, 8, 64, 20), 64, step, device)


def test_keys_that_32_bits_do_not_hold_are_sorted(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step(20)
    radix = len(step.work.member_rows) + 1
    monkeypatch.setattr(triton_route, "_counted", None)
    with pytest.raises(TypeError):
        check(triton_route.route, choose(20, 2, 6), 6, step, device)
    monkeypatch.setattr(triton_route, "LARGEST_KEY", 7 * radix - 1)
    check(triton_route.route, choose(20, 2, 6), 6, step, device)


@pytest.mark.parametrize("pairs", [40, 5000])
def test_most_chunks_is_a_bound_and_not_a_wild_one(pairs: int) -> None:
    """The worst case: every expert has one row more than full chunks of each composition."""
    from loramux.kernels.reference_experts import chunk_rows, most_chunks

    rows, step = chunk_rows(pairs), make_step(64)
    groups = 1 + min(step.work.max_chunks, len(step.work.member_rows))
    for experts in (1, 2, 8):
        most = most_chunks(pairs, experts, step.work)
        full, split = pairs // rows, min(pairs, experts * groups)
        assert most <= pairs and full <= most <= full + split
        sizes = [1] * split
        sizes[0] += pairs - split
        assert sum(-(-size // rows) for size in sizes) <= most
