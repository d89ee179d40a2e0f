"""Logits in bfloat16 against transformers and PEFT in float32: every mixture, eager and replayed,
prefill and decode, while adapters come and go between the replays."""

from __future__ import annotations

from typing import Any

import pytest

from gpu.mixtures import TIMES_NOISE, Asker, Wish, World, make_world, prompts
from gpu.replaying import DEVICES, WAYS, Event, use_seen_runner
from loramux import LLM

NUM_ADAPTERS = 12  # with more rank rows than 8 places of 16 have
NUM_TOKENS = 4
ONE: list[Wish] = [{"x2": 1.0}] * 3
EIGHT: list[Wish] = [{f"x{i}": 1.0} for i in range(8)]
OTHERS: list[Wish] = [{f"x{i}": 1.0} for i in range(4, 12)]
SUMS: list[Wish] = [
    {"x0": 0.7, "x1": 1.0},
    {},
    {"x2": -0.8},
    {"x11": 1.5},
    {"x0": 1.0},
    {"x3": 0.7, "x6": -1.0, "x9": 0.8},
]
# In this order: what a round needs has partly been evicted by the rounds before it.
ROUNDS: dict[str, list[Wish]] = {
    "base": [{}] * 5,
    "one": ONE,
    "eight": EIGHT,
    "one of many": [{}, *ONE, {}],
    "others": OTHERS,
    "sums": SUMS,
    "mixed": [{}, *EIGHT, {}],
    "mixed again": [{}, *EIGHT, {}],  # all of them are there and run together
}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp(request.param), request.param, NUM_ADAPTERS)


@pytest.fixture(scope="module")
def tolerance(world: World) -> float:
    noise = world.noise([{}, *SUMS, *EIGHT])
    assert 1e-3 < noise < 0.05
    return TIMES_NOISE * noise


def make_llm(world: World, device: str, **settings: Any) -> LLM:
    settings = {"dtype": "bfloat16", "max_loras": 8, "max_lora_rank": 16, **settings}
    return LLM(
        str(world.model),
        enable_lora=True,
        device=device,
        max_num_seqs=16,
        max_model_len=1024,
        max_num_batched_tokens=640,
        kv_cache_memory_bytes=32 << 20,
        async_scheduling=True,
        # Each prompt is computed anew in every round, by adapters that were loaded anew.
        enable_prefix_caching=False,
        **settings,
    )


def steps(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event.kind == kind]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["eager", "replay"])
def test_every_mixture(
    world: World, tolerance: float, mode: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_seen_runner(monkeypatch, device)
    eager = mode == "eager"
    sizes = [1, 2, 4, 8, 16, 64]  # the last keeps fewer rows than it has tokens
    # A GPU takes both; on a CPU one each will do.
    ways = list(WAYS) if device == "cuda" else ["kernel" if eager else "product"]
    with make_llm(world, device, enforce_eager=eager, cudagraph_capture_sizes=sizes) as llm:
        asker, everything = Asker(llm, world, tolerance), []
        for turn, way in enumerate(ways):
            asker.runner.shrink(way)
            for seed, wishes in enumerate(ROUNDS.values()):
                texts = prompts(len(wishes), seed + 100 * turn)
                everything += asker.ask(wishes, texts, NUM_TOKENS)
        assert llm.engine.stats().device_evictions >= 4
    replays, others = steps(everything, "replay"), steps(everything, "eager")
    # Prompts, and on their own way to them single tokens; the rest is decoding.
    assert any(event.tokens > event.rows for event in others)
    used = {event.base_rows for event in (others if eager else replays)}
    assert None in used and (0 in used) == ("kernel" in ways)
    assert (max(rows or 0 for rows in used) > 16) == ("product" in ways)
    if eager:
        assert not replays
        return
    kinds = [event.kind for event in everything]
    first, last = kinds.index("replay"), len(kinds) - kinds[::-1].index("replay")
    assert kinds[first:last].count("load") >= 8, "adapters came between replays"
    assert {event.key.tokens for event in replays if event.key} >= {4, 8, 16, 64}
    assert any(event.rows < event.tokens for event in replays), "prompts were replayed as well"


@pytest.mark.parametrize("device", DEVICES)
def test_long_prompts_in_chunks(
    world: World, tolerance: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of prompts beside decodes, large LoRA chunks, and the largest step there is."""
    use_seen_runner(monkeypatch, device)
    with make_llm(world, device, enforce_eager=True) as llm:
        asker = Asker(llm, world, tolerance)
        for seed, way in enumerate(WAYS):
            asker.runner.shrink(way)
            wishes: list[Wish] = [{}, {"x1": 1.0}, {"x0": 0.7, "x2": 1.0}, {"x2": 1.0}, {}]
            asker.ask(wishes, prompts(5, seed + 50), 1)  # the adapters are there from here on
            texts = prompts(3, seed, 5, 20) + prompts(2, seed, 590, 610)
            events = asker.ask(wishes, texts, NUM_TOKENS)
            assert max(event.tokens for event in events) == 640
            assert any(event.rows > 3 and 500 < event.tokens < 640 for event in events)
