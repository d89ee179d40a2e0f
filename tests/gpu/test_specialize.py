"""`specialize_active_lora`: the graph for a count of active adapters is replayed and is right."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gpu.mixtures import TIMES_NOISE, Asker, Wish, World, make_world, prompts
from gpu.replaying import DEVICES, WAYS, CpuReplayingRunner, use_seen_runner
from loramux import LLM, SamplingParams
from loramux.config.graphs import active_buckets
from loramux.engine.graphs import GraphKey, StepOutput
from loramux.engine.packing import runs_of
from loramux.engine.plan import Row, SampleSpec
from loramux.engine.rows import in_order
from loramux.engine.singles import single_tokens
from tiny import save_model

MAX_LORAS = 8
NUM_TOKENS = 3
SIZES = [1, 2, 4, 8, 16]
SAMPLE = SampleSpec(SamplingParams(temperature=0), seed=0, position=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("specialize"), "llama", MAX_LORAS)


@pytest.fixture(scope="module")
def tolerance(world: World) -> float:
    return TIMES_NOISE * world.noise([{}, *({name: 1.0} for name in world.adapters)])


def make_llm(world_model: Any, device: str, **settings: Any) -> LLM:
    defaults = {"dtype": "bfloat16", "cudagraph_capture_sizes": SIZES, "max_num_seqs": 16}
    return LLM(
        str(world_model),
        enable_lora=True,
        device=device,
        max_loras=MAX_LORAS,
        max_lora_rank=16,
        specialize_active_lora=True,
        kv_cache_memory_bytes=16 << 20,
        enable_prefix_caching=False,
        **(defaults | settings),
    )


def bucket_for(active: int) -> int:
    """The next power of two: for 1, 2, 3, 4, 5: 1, 2, 4, 4, 8."""
    return 1 << (active - 1).bit_length()


@pytest.mark.parametrize("device", DEVICES)
def test_every_count_with_and_without_base_rows(
    world: World, tolerance: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_seen_runner(monkeypatch, device)
    ways = list(WAYS) if device == "cuda" else ["kernel"]
    names = list(world.adapters)
    everybody: list[Wish] = [{name: 1.0} for name in names]
    with make_llm(world.model, device, async_scheduling=True) as llm:
        asker = Asker(llm, world, tolerance)
        asker.ask(everybody, prompts(MAX_LORAS, 1), 1)  # all are on the device from here on
        for way in ways:
            asker.runner.shrink(way)
            for count in range(1, MAX_LORAS + 1):
                for base in (0, 3):
                    # The last one twice, so that a run of it is longer than a row.
                    active = random.Random(count).sample(everybody, count)
                    wishes = [*active, active[-1], *([{}] * base)]
                    size = next(s for s in SIZES if s >= len(wishes))
                    events = asker.ask(wishes, prompts(len(wishes), count), NUM_TOKENS)
                    keys = {event.key for event in events if event.kind == "replay"}
                    assert keys == {GraphKey(size, True, *_wanted(keys, way), bucket_for(count))}


def _wanted(keys: set[Any], way: str) -> tuple[int]:
    """The pool rows in the base product, of which the key may have as many as it has to."""
    (rows,) = {key.base_rows for key in keys}
    assert (rows > 0) == (way == "product")
    return (rows,)


@pytest.mark.parametrize("device", DEVICES)
def test_more_compositions_than_adapters(
    world: World, tolerance: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter at two scales counts twice: no bucket has room, the graph for any number does."""
    use_seen_runner(monkeypatch, device)
    everybody: list[Wish] = [{name: 1.0} for name in world.adapters]
    wishes = [*everybody, {"x1": 0.7}, {"x2": 1.3}, {"x2": -1.0}, {}]
    with make_llm(world.model, device) as llm:
        asker = Asker(llm, world, tolerance)
        asker.ask(everybody, prompts(MAX_LORAS, 1), 1)
        events = asker.ask(wishes, prompts(len(wishes), 2), NUM_TOKENS)
    keys = {event.key for event in events if event.kind == "replay"}
    assert {(key.tokens, key.active) for key in keys if key} == {(16, 0)}


def test_buckets_are_powers_of_two() -> None:
    assert active_buckets(8) == [1, 2, 4, 8]
    assert active_buckets(6) == [1, 2, 4, 6]
    assert active_buckets(1) == [1]


# --- the choice of the key, and the chunks that its graph was captured for --------------------------


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CpuReplayingRunner]:
    """On a CPU, all adapters of rank 2 and on the device; its forward computes nothing."""
    model = save_model(tmp_path_factory.mktemp("tiny") / "model")
    sizes = [*SIZES, 5, 24, 64, 100]
    settings: dict[str, Any] = {"dtype": "float32", "cudagraph_capture_sizes": sizes}
    with pytest.MonkeyPatch.context() as patch:
        use_seen_runner(patch, "cpu")
        llm = make_llm(model, "cpu", **settings, max_num_seqs=100)
    runner: Any = llm.engine.runner
    runner._forward = _no_forward
    runner._ranks = {16 * place: 2 for place in range(MAX_LORAS)}
    yield runner
    llm.close()


def _no_forward(packed: Any, tokens: int, *rest: Any) -> StepOutput:
    return StepOutput(torch.zeros(tokens, 1), *(torch.zeros(tokens).long() for _ in range(2)))


def random_rows(rng: random.Random, count: int) -> list[Row]:
    """Decodes as the scheduler sorts them; few or many compositions, some of them sums."""
    kinds: list[Any] = [()] if rng.random() < 0.6 else []
    for _ in range(rng.randint(1, 12)):
        places = rng.sample(range(MAX_LORAS), 1 if rng.random() < 0.9 else 2)
        kinds.append(tuple((16 * place, rng.choice([1.0, 1.0, 0.5])) for place in sorted(places)))
    # Uneven shares, so that some compositions have chunks that are full and others a single row.
    weights = [rng.random() ** 3 + 1e-3 for _ in kinds]
    members = rng.choices(kinds, weights, k=count)
    rows = [Row(i, (5,), 3, (1,), member, SAMPLE) for i, member in enumerate(members)]
    return in_order(rows)


@pytest.mark.parametrize("way", WAYS)
def test_no_mixture_has_more_chunks_than_its_graph(runner: CpuReplayingRunner, way: str) -> None:
    """The runner asserts it in each replay, see `CpuReplayingRunner`; all buckets are met."""
    runner.shrink(way)
    rng, met = random.Random(way), set()
    for _ in range(1500):
        rows = random_rows(rng, rng.randint(1, 100))
        runs = runs_of(rows)
        active = len({row.members for row in rows} - {()})
        choice = runner._choose_lora(runs, len(rows))
        found = runner._find_graph(rows, runs, choice)
        if found is None:  # a kernel's activations of a sum are wider than the graph's
            assert choice is not None and choice.base_rows == 0 and choice.width > 16
            continue
        key, captured = found
        runner._replay(rows, key, captured, choice)
        assert key.tokens == next(s for s in sorted(runner._graphs.sizes) if s >= len(rows))
        if active:
            assert key.active >= active or key.active == 0
            assert key.active in (0, bucket_for(active)), "and no larger than it has to be"
            # The graph for any number only where no bucket has room, or none was captured.
            assert key.active or bucket_for(active) > min(MAX_LORAS, key.tokens)
        met.add(key.active if active else None)
    assert met == {None, 0, 1, 2, 4, 8}


@pytest.mark.parametrize("way", WAYS)
def test_rows_in_which_adapters_begin_fit_their_graph(runner: CpuReplayingRunner, way: str) -> None:
    """Short prompts whose first tokens are the base model's, or another composition's."""
    runner.shrink(way)
    rng, replayed, scattered = random.Random(), 0, 0
    for _ in range(400):
        rows = random_rows(rng, rng.randint(0, 20))
        for number in range(rng.randint(1, 8)):
            count, place = rng.randint(2, 8), 16 * rng.randrange(MAX_LORAS)
            early = rng.choice([(), (), ((place, 0.5),)])
            members = (*early, ((place + 16) % (16 * MAX_LORAS), 1.0))
            tokens, before = (5,) * count, (rng.randrange(1, count), early)
            rows.append(Row(100 + number, tokens, 0, (1,), members, SAMPLE, before=before))
        rows = in_order(rows)
        runs = runs_of(rows)
        singles = single_tokens(rows, runner.block_size, runner._limits)
        assert singles is not None and runs_of(singles) == runs
        choice = runner._choose_lora(runs, len(singles))
        if (found := runner._find_graph(singles, runs, choice)) is not None:
            runner._replay(singles, *found, choice)
            replayed += 1
            scattered += sum(not run.members for run in runs) > 1
    assert replayed > 100 and scattered > 50


def test_five_adapters_in_a_graph_of_five(runner: CpuReplayingRunner) -> None:
    """A bucket of 8 is not captured for 5 rows: the graph for any number serves."""
    rows = [Row(i, (5,), 3, (1,), ((16 * i, 1.0),), SAMPLE) for i in range(5)]
    choice = runner._choose_lora(runs_of(rows), 5)
    found = runner._find_graph(rows, runs_of(rows), choice)
    assert found is not None and (found[0].tokens, found[0].active) == (5, 0)


def test_rows_that_do_not_sample_are_left_out_of_what_is_replayed(
    runner: CpuReplayingRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would shift the rows behind them: a prompt's tokens but for the last."""
    rows = [Row(i, (5,), 3, (1,), (), SAMPLE if i % 3 else None) for i in range(6)]
    found = runner._find_graph(rows, runs_of(rows), None)
    assert found is not None
    key, captured = found
    numbered = StepOutput(*(torch.arange(key.tokens).view(-1, *one) for one in ([1], [], [])))
    captured = dataclasses.replace(captured, output=numbered)
    monkeypatch.setitem(runner._graphs._graphs, key, captured)
    output = runner._replay(rows, key, captured, None)
    for values in (output.logits[:, 0], output.greedy, output.ids):
        assert values.tolist() == [1, 2, 4, 5]


@pytest.mark.parametrize("device", DEVICES)
def test_a_prompt_that_is_chunked_to_single_tokens(
    world: World, tolerance: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside three decodes a step of four tokens has room for one token of the prompt."""
    use_seen_runner(monkeypatch, device)
    with make_llm(world.model, device, max_num_batched_tokens=4) as llm:
        asker = Asker(llm, world, tolerance)
        wishes: list[Wish] = [{}, {}, {}, {"x0": 1.0}]
        texts = [*prompts(3, 1, 1, 1), *prompts(1, 2, 6, 6)]
        asker.ask([{"x0": 1.0}], prompts(1, 3), 1)
        events = asker.ask(wishes, texts, 12)
    assert any(event.tokens == event.rows == 4 for event in events)
