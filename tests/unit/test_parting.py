"""How ranks part: graphs go before the communicator, and nobody waits for ever."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import cast

import torch

from loramux.engine.gpu_runner import GpuRunner
from loramux.engine.graphs import Captured, GraphKey, StepGraphs, StepOutput
from loramux.engine.leading import LeadingRunner
from loramux.engine.team import Team
from loramux.parallel import ALONE, Group
from tiny import TinyWorld


class Graph:
    def __init__(self, told: list[str]):
        self._told = told

    def reset(self) -> None:
        self._told.append("graph")


class Communicator:
    """One that ends only when no graph is left, as NCCL's."""

    def __init__(self, told: list[str], graphs: StepGraphs):
        self._told, self._graphs = told, graphs

    def abort(self) -> None:
        assert not len(self._graphs)
        self._told.append("group")


def test_graphs_go_before_the_communicator(tmp_path: Path) -> None:
    told: list[str] = []
    graphs = StepGraphs([1, 2], lambda key: None, lambda key: cast(StepOutput, None))
    for size in (1, 2):
        graph = cast(torch.cuda.CUDAGraph, Graph(told))
        graphs._graphs[GraphKey(size)] = Captured(graph, cast(StepOutput, None))
    runner, team = GpuRunner.__new__(GpuRunner), Team.__new__(Team)
    runner._graphs = graphs
    team.group = Group(0, 2, Communicator(told, graphs))
    team._folder = str(tmp_path / "store")
    leading = LeadingRunner.__new__(LeadingRunner)
    leading._runner, leading._team = runner, team
    leading.close()
    assert told == ["graph", "graph", "group"]
    assert graphs.get(GraphKey(1)) is None


def test_the_communicator_goes_before_the_store(tmp_path: Path) -> None:
    """It asks the store to its end, and that waits minutes for a file that is gone."""
    store = tmp_path / "store"
    store.mkdir()
    seen: list[bool] = []

    class Asking:
        def __del__(self) -> None:
            seen.append(store.exists())

        def abort(self) -> None:
            seen.append(store.exists())

    team = Team.__new__(Team)
    team.group, team._folder = Group(0, 2, Asking()), str(store)
    team.leave()
    assert seen == [True, True]
    assert not store.exists()


def test_a_communicator_that_never_ends_is_left_behind() -> None:
    free = threading.Event()

    class Stuck:
        def abort(self) -> None:
            free.wait()

    before = time.monotonic()
    Group(0, 2, Stuck()).close(wait_s=0.05)
    assert time.monotonic() - before < 5
    free.set()
    ALONE.close()  # has nothing to leave


def test_a_process_that_had_two_ranks_ends(tiny_world: TinyWorld) -> None:
    code = (
        "import sys; from loramux import LLM, SamplingParams\n"
        "with LLM(sys.argv[1], device='cpu', tensor_parallel_size=2) as llm:\n"
        "    llm.generate(['a'], SamplingParams(max_tokens=2))\n"
    )
    command = [sys.executable, "-c", code, str(tiny_world.model)]
    subprocess.run(command, check=True, timeout=120)
