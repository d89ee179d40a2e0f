"""FlashInfer behind its planner against the float64 oracle; captured, uncaptured and mixed steps.

The first run compiles five modules, which takes minutes where they are not in FlashInfer's cache."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kernel_cases import STEP, assert_close, attention_oracle, fill_cache, make_batch, strided

from loramux.kernels import AttentionBatch
from loramux.kernels.flashinfer_attention import FlashInferPlanner, Kind, available

pytestmark = pytest.mark.gpu

SIZE, DIM, DTYPE = 16, 128, torch.bfloat16
SCALING = DIM**-0.5
PLAIN: Kind = (SCALING, 0, 0.0)
CAPPED: Kind = (SCALING, 40, 20.0)
KINDS = (PLAIN, CAPPED)
DECODE = [(1, 1), (1, 16), (1, 70), (1, 900)]
MIXED = [(1, 37), (15, 15), (3, 40), (1, 700), (130, 300)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    if reason := available(DIM, DIM, DTYPE, torch.device("cuda")):
        pytest.skip(reason)
    torch.manual_seed(7)


def make_planner(
    heads: tuple[int, int], kinds: tuple[Kind, ...] = KINDS, max_rows: int = 0
) -> FlashInferPlanner:
    return FlashInferPlanner(
        *(torch.device("cuda"), *heads, DIM, SIZE, DTYPE, kinds),
        **{"max_batch": 16, "max_blocks": 2048, "max_rows": max_rows},
    )


@dataclass
class Step:
    """A random step: its oracle on the host, its lists in page-locked memory."""

    batch: AttentionBatch
    q: torch.Tensor
    caches: tuple[torch.Tensor, torch.Tensor]
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    last_page_len: torch.Tensor
    qo_indptr: torch.Tensor

    def wanted(self, kind: Kind) -> torch.Tensor:
        return attention_oracle(self.q, *self.caches, self.batch, *kind)

    def on_gpu(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q.cuda(), self.caches[0].cuda(), self.caches[1].cuda()

    def send(self, planner: FlashInferPlanner) -> None:
        """What a runner does with one copy of one packed buffer."""
        for name in ("kv_indptr", "kv_indices", "last_page_len", "qo_indptr"):
            source, target = getattr(self, name), getattr(planner.buffers, name)
            target[: len(source)].copy_(source, non_blocking=True)


def make_step(lengths: list[tuple[int, int]], heads: tuple[int, int], pad_to: int = 0) -> Step:
    """NaN wherever no sequence has a position. Padding: a query, and one position in block 0."""
    batch, blocks = make_batch(lengths, SIZE)
    caches = tuple(fill_cache(batch, blocks, SIZE, heads[1], DIM, DTYPE) for _ in range(2))
    q = strided(batch.query_starts[-1], heads[0], DIM, dtype=DTYPE)
    padding = max(0, pad_to - len(lengths))
    pages, starts, lasts = [], [0], []
    for row, context in enumerate(batch.context_lens):
        count = -(-context // SIZE)
        pages += batch.block_tables[row, :count].tolist()
        starts.append(len(pages))
        lasts.append(context - (count - 1) * SIZE)
    pages += [0] * padding
    starts += range(starts[-1] + 1, starts[-1] + padding + 1)
    queries = list(batch.query_starts)
    queries += range(queries[-1] + 1, queries[-1] + padding + 1)
    lists = [torch.tensor(v, dtype=torch.int32) for v in (starts, pages, lasts + [1] * padding)]
    locked = [t.pin_memory() for t in (*lists, torch.tensor(queries, dtype=torch.int32))]
    return Step(batch, q, (caches[0], caches[1]), *locked)


def assert_right(out: torch.Tensor, step: Step, kind: Kind) -> None:
    assert_close(out.cpu(), step.wanted(kind), steps=2.0, floor=STEP[DTYPE])


@pytest.mark.parametrize("heads", [(8, 2), (4, 2)], ids=["tensor-cores", "plain-cores"])
def test_decode_without_a_graph(heads: tuple[int, int]) -> None:
    kinds = KINDS if heads == (8, 2) else (PLAIN,)
    planner = make_planner(heads, kinds)
    for lengths in (DECODE, [(1, 300)], DECODE * 4, [(1, 33)] * 3):
        step = make_step(lengths, heads)
        planner.plan_decode(len(lengths), step.kv_indptr, step.last_page_len, graph=False)
        step.send(planner)
        inputs = step.on_gpu()
        for kind in kinds:
            assert_right(planner.run(*inputs, kind), step, kind)


def test_prefill_and_mixed_steps() -> None:
    planner = make_planner((8, 2))
    for lengths in ([(50, 50)], MIXED, DECODE, [(700, 700), (0, 5)], MIXED):
        step = make_step(lengths, (8, 2))
        rows = step.batch.query_starts[-1]
        planner.plan_prefill(step.qo_indptr, step.kv_indptr, step.last_page_len, rows)
        step.send(planner)
        inputs = step.on_gpu()
        for kind in KINDS:
            assert_right(planner.run(*inputs, kind), step, kind)


def test_decodes_beside_prefills() -> None:
    """The first sequences of a step are decoded, the others prefilled; then all of them decode."""
    planner = make_planner((8, 2), (PLAIN,))
    for lengths in (DECODE + MIXED[1:3], [(1, 9), *MIXED[4:]], DECODE, MIXED):
        decodes = sum(1 for rows, _ in lengths if rows == 1) if lengths is not MIXED else 1
        step = make_step(lengths, (8, 2))
        rows = step.batch.query_starts[-1]
        planner.plan_prefill(step.qo_indptr, step.kv_indptr, step.last_page_len, rows, decodes)
        step.qo_indptr = (step.qo_indptr[decodes:] - decodes).pin_memory()
        step.send(planner)
        inputs = step.on_gpu()
        assert_right(planner.run(*inputs, PLAIN), step, PLAIN)


class Graph:
    """Decode at one batch size, captured with a step of next to nothing."""

    def __init__(self, planner: FlashInferPlanner, size: int, heads: tuple[int, int], blocks: int):
        self.planner, self.size = planner, size
        self.q = torch.zeros(size, heads[0], DIM, dtype=DTYPE, device="cuda")
        shape = (blocks, SIZE, heads[1], DIM)
        self.caches = [torch.zeros(shape, dtype=DTYPE, device="cuda") for _ in range(2)]
        self.plan(make_step([(1, 1)], heads, pad_to=size))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run()
        torch.cuda.current_stream().wait_stream(side)
        self.info = self._plan_info()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self._run()

    def _run(self) -> dict[Kind, torch.Tensor]:
        return {kind: self.planner.run(self.q, *self.caches, kind) for kind in KINDS}

    def _plan_info(self) -> list[list[int]]:
        return [list(lane.decoder._plan_info) for lane in self.planner._lanes.values()]

    def plan(self, step: Step) -> None:
        self.planner.plan_decode(self.size, step.kv_indptr, step.last_page_len, graph=True)
        step.send(self.planner)

    def replay(
        self, step: Step, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> dict[Kind, torch.Tensor]:
        """Queue a whole step; copies of the outputs, for the next replay overwrites them."""
        self.plan(step)
        assert self._plan_info() == self.info, "the graph was captured with another layout"
        count = len(step.batch.context_lens)
        self.q[:count].copy_(inputs[0])
        for own, other in zip(self.caches, inputs[1:], strict=True):
            own[: len(other)].copy_(other)
        self.graph.replay()
        return {kind: out[:count].clone() for kind, out in self.outputs.items()}


def test_one_graph_serves_every_plan() -> None:
    planner = make_planner((8, 2), max_rows=48)
    whole, large, small = (Graph(planner, size, (8, 2), 600) for size in (48, 16, 4))
    for lengths, graph in (
        (DECODE, small),
        (DECODE * 4, large),
        # More rows than work is cut for: those of two prompts beside decodes; all, and few.
        ([(1, n) for n in (*range(1, 31), *range(200, 216))] + [(1, 700)] * 2, whole),
        ([(1, 40)] * 20, whole),
        ([(1, 5000)], small),
        ([(1, 9)] * 7, large),
        ([(1, 1)], small),
    ):
        step = make_step(lengths, (8, 2), pad_to=graph.size)
        outputs = graph.replay(step, step.on_gpu())
        for kind, out in outputs.items():
            assert_right(out, step, kind)


def test_plans_are_made_while_the_device_is_behind() -> None:
    """The host runs ahead of the device as far as the planner lets it."""
    planner = make_planner((8, 2))
    graph = Graph(planner, 4, (8, 2), 400)
    lengths = [DECODE, [(1, 2000)], [(1, 33)] * 4, [(1, 3)], DECODE[::-1], [(1, 500)] * 2]
    steps = [make_step(one, (8, 2), pad_to=4) for one in lengths]
    inputs = [step.on_gpu() for step in steps]
    torch.cuda.synchronize()
    results = []
    for step, data in zip(steps, inputs, strict=True):
        torch.cuda._sleep(20_000_000)  # some 10 ms
        results.append(graph.replay(step, data))
    for step, outputs in zip(steps, results, strict=True):
        for kind, out in outputs.items():
            assert_right(out, step, kind)


def test_planning_does_not_wait_for_the_device() -> None:
    """Decode and prefill plans of two steps are queued behind a busy device, which stays busy."""
    planner = make_planner((8, 2), (PLAIN,))
    steps = [make_step(DECODE, (8, 2)) for _ in range(2)]

    def plan(step: Step) -> None:
        planner.plan_decode(4, step.kv_indptr, step.last_page_len, graph=False)
        planner.plan_prefill(step.qo_indptr, step.kv_indptr, step.last_page_len, 4)

    for step in steps:
        plan(step)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(1_000_000_000)  # half a second or more
    done.record()
    plan(steps[0])
    assert not done.query()
    torch.cuda.synchronize()
