"""A name is replaced a thousand times while it answers: nothing fails, nothing mixes, nothing stays."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from loramux.config import EngineConfig, LoRAConfig
from loramux.engine.service import AsyncEngine
from loramux.types import AdapterRef, AdapterUse, SamplingParams
from tiny import save_adapter, save_model

CYCLES = 1000
PROMPT = [5, 9, 44, 102, 33]
PARAMS = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
MAX_LORAS, MAX_CPU_LORAS = 3, 4
Answer = tuple[str, tuple[int, ...]]  # digest, tokens


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A model of one layer, and five versions of an adapter, of ranks 1 to 5."""
    root = tmp_path_factory.mktemp("cycles")
    model = save_model(root / "model", num_hidden_layers=1)
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 16}
    folders = [save_adapter(model, root / f"v{r}", seed=r, r=r, **settings) for r in range(1, 6)]
    return model, folders


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


async def ask(engine: AsyncEngine, request_id: str, name: str = "x") -> Answer:
    seen: list[AdapterRef] = []

    def admitted(refs: Sequence[AdapterRef]) -> None:
        seen.extend(refs)

    deltas = engine.generate(request_id, PROMPT, PARAMS, [AdapterUse(name)], admitted)
    tokens = []
    async for delta in deltas:
        assert delta.error is None, delta.error
        tokens += delta.token_ids
    return seen[0].digest, tuple(tokens)


async def until_idle(engine: AsyncEngine) -> None:
    while engine.stats().running or engine.stats().waiting:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("pinned", [False, True], ids=["free", "pinned"])
def test_a_thousand_replacements_under_traffic(
    world: tuple[Path, list[Path]], pinned: bool
) -> None:
    model, folders = world
    lora = LoRAConfig(max_loras=MAX_LORAS, max_lora_rank=5, max_cpu_loras=MAX_CPU_LORAS)
    engine = AsyncEngine.create(EngineConfig(model=str(model), device="cpu", lora=lora))
    inner = engine._engine
    cycles = CYCLES if not pinned else CYCLES // 4

    async def run() -> None:
        await engine.start()
        alone: dict[str, tuple[int, ...]] = {}
        for index, folder in enumerate(folders):
            await engine.add_adapter(f"v{index}", str(folder))
            digest, tokens = await ask(engine, f"alone-{index}", f"v{index}")
            alone[digest] = tokens
            await engine.remove_adapter(f"v{index}", drain_s=5)
        assert len(set(alone.values())) == len(folders), "every version answers differently"
        await engine.add_adapter("x", str(folders[0]), pinned=pinned)
        before, replaced, answered = open_files(), asyncio.Event(), set()

        async def clients(number: int) -> None:
            count = 0
            while not replaced.is_set():
                digest, tokens = await ask(engine, f"{number}-{count}")
                assert tokens == alone[digest], "an answer is not wholly of its version"
                answered.add(digest)
                count += 1

        async def replace() -> None:
            try:
                for _ in range(cycles):
                    folder = random.choice(folders)  # in turn, they would beat with the steps
                    await engine.add_adapter("x", str(folder), load_inplace=True)
            finally:
                replaced.set()

        await asyncio.gather(replace(), *(clients(number) for number in range(6)))
        assert len(answered) > 1, "the answers came from several versions"
        await until_idle(engine)
        assert open_files() <= before + 2
        registry, pool = inner.require_store().registry, inner.scheduler.adapters
        assert pool is not None
        assert len(registry._versions) == 1 and len(inner.require_store()._sources) == 1
        done = await engine.remove_adapter("x", drain_s=5)
        assert done.freed and not done.ended
        # The version before may have gone a moment ago, and the loop's thread frees its rows.
        deadline = time.monotonic() + 5
        while engine.stats().adapter_device_bytes and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        stats = engine.stats()
        assert (stats.adapter_host_bytes, stats.adapter_device_bytes) == (0, 0)
        assert not registry._versions and not inner.require_store()._sources
        assert not pool.pins and not pool.resident() and not stats.adapters
        inner.check_integrity()
        await engine.stop()

    asyncio.run(run())
    gc.collect()
