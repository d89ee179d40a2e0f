"""Each test runs on both implementations of the CPU ops, the compiled one with 1 and 2 threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from loramux.kernels import cpu_build, reference
from loramux.kernels.dispatch import Backend


@pytest.fixture(autouse=True)
def seeded_on_one_thread() -> Iterator[None]:
    """One thread, because on a busy machine each of the oracles' small regions may wait long."""
    torch.manual_seed(20)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class OnTwoThreads:
    """A module of ops, each called with two threads."""

    def __init__(self, module: Backend):
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._call, getattr(self._module, name))

    def _call(self, op: Callable[..., Any], *args: Any) -> Any:
        torch.set_num_threads(2)
        try:
            return op(*args)
        finally:
            torch.set_num_threads(1)


@pytest.fixture(params=["twin", "compiled-1", "compiled-2"])
def ops(request: pytest.FixtureRequest) -> Any:
    """An implementation; the number is that of torch's threads."""
    if request.param == "twin":
        return reference
    if cpu_build.library() is None:
        pytest.skip("no compiled CPU kernels here (no compiler, or switched off)")
    from loramux.kernels import cpu

    return OnTwoThreads(cpu) if request.param == "compiled-2" else cpu


@pytest.fixture(params=["grid", "loop"] if torch.cuda.is_available() else ["loop"])
def _grids(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where small cases have a program for each item, also with programs that loop."""
    triton_delta = pytest.importorskip("loramux.kernels.triton_delta")
    if request.param == "loop":
        monkeypatch.setattr(triton_delta, "_most_programs", lambda device: 5)
