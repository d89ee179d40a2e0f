"""Adapters on several ranks: replaced under traffic, on all ranks together or on none."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from loramux import LLM, LoRARequest, SamplingParams
from loramux.adapters.weights import AdapterWeights
from loramux.config import EngineConfig, LoRAConfig
from loramux.engine.runner import Runner
from loramux.engine.service import AsyncEngine
from loramux.errors import AdapterLoadFailed, EngineError
from loramux.types import AdapterUse
from ranks import thread_ranks  # noqa: F401
from tiny import TinyWorld

pytestmark = pytest.mark.usefixtures("thread_ranks")
PROMPT = [5, 9, 44, 102, 33]
PARAMS = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
Parts = tuple[AdapterWeights, AdapterWeights | None]


@pytest.fixture(scope="module")
def expected(tiny_world: TinyWorld) -> dict[str, list[int]]:
    """What one rank answers with each adapter, and with none."""
    loras = {n: LoRARequest(n, 1, str(tiny_world.adapters[n])) for n in "ab"}
    with LLM(str(tiny_world.model), enable_lora=True, device="cpu", max_lora_rank=8) as llm:
        asked = [None, *loras.values()]
        outputs = llm.generate([PROMPT] * 3, PARAMS, lora_request=asked)
    found = dict(zip(["base", "a", "b"], (o.outputs[0].token_ids for o in outputs), strict=True))
    assert len({tuple(tokens) for tokens in found.values()}) == 3
    return found


@pytest.fixture(params=[False, True], ids=["default", "fully"])
def engine(tiny_world: TinyWorld, request: pytest.FixtureRequest) -> Iterator[AsyncEngine]:
    lora = LoRAConfig(
        max_loras=2, max_lora_rank=8, max_cpu_loras=4, fully_sharded_loras=request.param
    )
    yield AsyncEngine.create(
        EngineConfig(
            model=str(tiny_world.model),
            device="cpu",
            tensor_parallel_size=2,
            lora=lora,
            adapter_patience_s=0.02,
        )
    )


async def _answer(engine: AsyncEngine, request_id: str, *adapters: str) -> list[int]:
    uses = [AdapterUse(name) for name in adapters]
    deltas = [d async for d in engine.generate(request_id, PROMPT, PARAMS, uses)]
    assert deltas[-1].error is None
    return [token for delta in deltas for token in delta.token_ids]


def test_every_answer_is_wholly_of_one_version(
    engine: AsyncEngine, tiny_world: TinyWorld, expected: dict[str, list[int]]
) -> None:
    async def run() -> None:
        await engine.start()
        await engine.add_adapter("x", str(tiny_world.adapters["a"]))
        seen: list[list[int]] = []

        async def change() -> None:
            for i in range(12):
                path = tiny_world.adapters["ba"[i % 2]]
                await engine.add_adapter("x", str(path), load_inplace=True)
                await asyncio.sleep(0.02)

        async def ask(i: int) -> None:
            await asyncio.sleep(i * 0.007)
            if i % 5 == 0:
                assert await _answer(engine, str(i)) == expected["base"]
            else:
                seen.append(await _answer(engine, str(i), "x"))

        await asyncio.gather(change(), *(ask(i) for i in range(50)))
        assert all(tokens in (expected["a"], expected["b"]) for tokens in seen)
        assert expected["a"] in seen and expected["b"] in seen
        while engine.stats().running:
            await asyncio.sleep(0.01)
        await engine.stop()
        engine._engine.check_integrity()

    asyncio.run(run())


def test_a_rank_that_cannot_take_a_new_version_refuses_for_all(
    engine: AsyncEngine,
    tiny_world: TinyWorld,
    expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts, broken = Runner._parts, [True]

    def fails(self: Runner, weights: AdapterWeights) -> Parts:
        if self.group.rank == 1 and broken[0]:
            raise AdapterLoadFailed("rank 1 has no memory")
        return parts(self, weights)

    async def run() -> None:
        await engine.start()
        await engine.add_adapter("x", str(tiny_world.adapters["a"]))
        assert await _answer(engine, "before", "x") == expected["a"]
        monkeypatch.setattr(Runner, "_parts", fails)
        with pytest.raises(EngineError, match="rank 1 has no memory"):
            await engine.add_adapter("x", str(tiny_world.adapters["b"]), load_inplace=True)
        with pytest.raises(EngineError, match="rank 1 has no memory"):
            await engine.add_adapter("y", str(tiny_world.adapters["b"]))
        assert [status.ref.name for status in engine.adapters()] == ["x"]
        assert await _answer(engine, "after", "x") == expected["a"]
        broken[0] = False
        await engine.add_adapter("x", str(tiny_world.adapters["b"]), load_inplace=True)
        assert await _answer(engine, "at last", "x") == expected["b"]
        await engine.stop()
        engine._engine.check_integrity()

    asyncio.run(run())
