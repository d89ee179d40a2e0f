"""Ranks in processes: one that is lost ends them all, and a load that fails on one fails for all."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from loramux import LLM, LoRARequest, SamplingParams
from loramux.config import EngineConfig, LoRAConfig
from loramux.engine import service
from loramux.engine.leading import LeadingRunning
from loramux.engine.plan import StepResult
from loramux.engine.runner import Runner
from loramux.engine.service import AsyncEngine
from loramux.errors import AdapterLoadFailed, ConfigError, EngineError, EngineStopped
from loramux.models.loader import load_model
from loramux.types import Delta
from ranks import thread_ranks  # noqa: F401
from tiny import TinyWorld, save_model

PROMPT = [5, 9, 44, 102, 33]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=240, ignore_eos=True, n=2)


def test_a_killed_rank_ends_every_request_with_an_error(tiny_world: TinyWorld) -> None:
    engine = AsyncEngine.create(
        EngineConfig(model=str(tiny_world.model), device="cpu", tensor_parallel_size=2)
    )

    async def ask(name: str) -> list[Delta]:
        return [delta async for delta in engine.generate(name, PROMPT, LONG)]

    async def run() -> list[list[Delta]]:
        await engine.start()
        asked = [asyncio.create_task(ask(str(i))) for i in range(4)]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in asked)
        team = engine._engine.team
        assert team is not None
        team._processes[1].kill()
        begin = time.monotonic()
        answers = await asyncio.wait_for(asyncio.gather(*asked), 10)
        assert time.monotonic() - begin < 10
        with pytest.raises(EngineStopped):
            await ask("late")
        await engine.stop()
        return answers

    for deltas in asyncio.run(run()):
        ends = [delta for delta in deltas if delta.finished]
        assert len(ends) == 2 and all(isinstance(end.error, EngineStopped) for end in ends)
        assert "rank 1 of 2 is lost" in str(ends[0].error)
    assert isinstance(engine.failure, EngineStopped)  # with which `serve` exits non-zero


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("comes_back", [True, False], ids=["the loop returns", "the loop is stuck"])
def test_a_step_that_stands_still_ends_every_request(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    """As under NCCL, where rank 0 waits for its device and the device for another rank."""
    hangs, released = threading.Event(), threading.Event()
    read = LeadingRunning.read

    def waits(running: LeadingRunning) -> StepResult:
        if hangs.is_set():
            with running.team.watch.waiting():
                lost = lambda: running.team.lost is not None and comes_back  # noqa: E731
                while not lost() and not released.wait(0.02):
                    pass
        return read(running)

    monkeypatch.setattr(LeadingRunning, "read", waits)
    monkeypatch.setattr(service, "STUCK_S", 0.5)
    config = {"device": "cpu", "tensor_parallel_size": 2, "rank_timeout_s": 1.0}
    engine = AsyncEngine.create(EngineConfig(model=str(tiny_world.model), **config))

    async def ask(name: str) -> list[Delta]:
        return [delta async for delta in engine.generate(name, PROMPT, LONG)]

    async def run() -> list[list[Delta]]:
        await engine.start()
        asked = [asyncio.create_task(ask(str(i))) for i in range(3)]
        await asyncio.sleep(0.2)
        hangs.set()
        answers = await asyncio.wait_for(asyncio.gather(*asked), 10)
        await asyncio.wait_for(engine.stop(), 10)
        return answers

    answers = asyncio.run(run())
    released.set()
    for deltas in answers:
        ends = [delta for delta in deltas if delta.finished]
        assert {end.index for end in ends} == {0, 1} and len(ends) == 2
        assert all("a step has stood still for 1 s" in str(end.error) for end in ends)
    assert engine.stuck is not comes_back and isinstance(engine.failure, EngineStopped)


@pytest.mark.usefixtures("thread_ranks")
def test_a_team_at_rest_is_left_alone(tiny_world: TinyWorld) -> None:
    settings = {"device": "cpu", "tensor_parallel_size": 2, "rank_timeout_s": 1.0}
    with LLM(str(tiny_world.model), **settings) as llm:
        before = llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids
        time.sleep(1.5)
        assert llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids == before


@pytest.mark.usefixtures("thread_ranks")
def test_a_load_that_fails_on_one_rank_fails_for_all(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, broken = Runner._write, [True]

    def fails(self: Runner, *arguments: object) -> None:
        if self.group.rank == 1 and broken[0]:
            raise AdapterLoadFailed("the disk is on fire")
        write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Runner, "_write", fails)
    lora = LoRARequest("a", 1, str(tiny_world.adapters["a"]))
    with LLM(str(tiny_world.model), enable_lora=True, device="cpu") as alone:
        expected = alone.generate([PROMPT], GREEDY, lora_request=lora)[0].outputs[0].token_ids
    settings = {"device": "cpu", "tensor_parallel_size": 2}
    with LLM(str(tiny_world.model), enable_lora=True, **settings) as llm:
        base = llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids
        with pytest.raises(EngineError, match="on fire"):
            llm.generate([PROMPT], GREEDY, lora_request=lora)
        assert llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids == base
        broken[0] = False
        again = llm.generate([PROMPT], GREEDY, lora_request=lora)
        assert again[0].outputs[0].token_ids == expected != base
        llm.engine.check_integrity()


@pytest.mark.usefixtures("thread_ranks")
def test_both_factors_fall_to_a_share(tiny_world: TinyWorld) -> None:
    def bytes_of(size: int, fully: bool, max_rank: int = 16) -> tuple[int, int]:
        settings = {"device": "cpu", "tensor_parallel_size": size, "fully_sharded_loras": fully}
        limits = {"max_loras": 4, "max_lora_rank": max_rank}
        with LLM(str(tiny_world.model), enable_lora=True, **settings, **limits) as llm:
            sites = llm.engine.runner.attached.sites
            pools = [
                pool
                for merged in sites
                for pool in (merged.site, getattr(merged, "dealt_site", None))
                if pool is not None
            ]
            return sum(p.a.nbytes for p in pools), sum(p.b.nbytes for p in pools)

    a, b = bytes_of(1, False)
    assert bytes_of(2, True) == (a // 2, b // 2)
    assert bytes_of(2, True, 15) == (a // 2, b // 2)  # 15 rank rows are 8 on each
    half_a, half_b = bytes_of(2, False)
    assert a // 2 < half_a < a and b // 2 < half_b < b


@pytest.mark.usefixtures("thread_ranks")
def test_a_model_that_cannot_be_cut_says_why(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", "llama", num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(ConfigError, match=r"4 heads cannot be dealt out evenly to 3 ranks"):
        LLM(str(model), device="cpu", tensor_parallel_size=3)


def test_one_rank_may_be_told_to_shard_fully(tiny_world: TinyWorld) -> None:
    lora = LoRAConfig(fully_sharded_loras=True)
    config = EngineConfig(model=str(tiny_world.model), device="cpu", lora=lora)
    assert config.row_granule == 1 and load_model(config).facts.row_granule == 1
