"""Memory that runs out: at start a refusal that names a budget, later one load or none."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console

from loramux import LLM, LoRARequest, SamplingParams
from loramux.config import EngineConfig, ServerConfig
from loramux.engine import engine as engine_module
from loramux.engine.gpu_runner import GpuRunner
from loramux.engine.memory_table import show
from loramux.engine.plan import AdapterLoad
from loramux.engine.service import AsyncEngine
from loramux.errors import AdapterLoadFailed, ConfigError, UnsupportedModel
from loramux.layers.attention import PagedAttention
from loramux.layers.linear import MergedLinear
from loramux.models import device_memory, loader
from loramux.models.device_memory import DeviceMemory, is_out_of_memory
from loramux.server import run
from loramux.types import AdapterUse, Delta
from tiny import TinyWorld

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPT = [5, 9, 44, 102]


def _full(*_: object, **__: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _start(world: TinyWorld, **settings: Any) -> LLM:
    return LLM(str(world.model), device="cpu", enable_lora=True, max_loras=2, **settings)


@pytest.mark.parametrize(
    ("place", "name", "said"),
    [
        (loader, "_from_pretrained", "the weights take"),
        (loader, "fuse", "the weights take"),
        (MergedLinear, "attach_site", "adapter pool"),
        (PagedAttention, "allocate", "KV cache"),
        (GpuRunner, "_make_buffers", "workspaces"),
        (GpuRunner, "_capture", "CUDA graphs"),
    ],
)
def test_out_of_memory_at_start_names_what_to_lower(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, said: str
) -> None:
    monkeypatch.setattr(engine_module, "make_runner", GpuRunner)
    if name == "allocate":
        # The probe before has a cache of one block, which fits.
        allocate = PagedAttention.allocate

        def small_only(self: PagedAttention, blocks: int, *rest: Any) -> None:
            (allocate if blocks == 1 else _full)(self, blocks, *rest)

        monkeypatch.setattr(place, name, small_only)
    else:
        monkeypatch.setattr(place, name, _full)
    with pytest.raises(ConfigError, match=said) as refused:
        _start(tiny_world)
    assert refused.value.remedy and not isinstance(refused.value, UnsupportedModel)
    assert ("MiB" in refused.value.remedy) or ("GiB" in refused.value.remedy)


def test_out_of_memory_in_the_largest_step(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnGpu(GpuRunner):
        """Warms up as it would on a GPU."""

        def _capture(self) -> None:
            self._on_gpu = True

        def warm_up(self) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine_module, "make_runner", OnGpu)
    with pytest.raises(ConfigError, match="largest step") as refused:
        _start(tiny_world, max_num_batched_tokens=4096)
    assert refused.value.field == "max_num_batched_tokens"
    assert "--max-num-batched-tokens to" in str(refused.value)


def test_other_errors_at_start_stay_what_they_are(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(PagedAttention, "allocate", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        _start(tiny_world)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
        (None, False),
    ],
)
def test_what_running_out_looks_like(error: BaseException | None, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_cache_larger_than_the_free_memory_is_refused(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "device_memory", lambda device: DeviceMemory(64 << 20))
    with pytest.raises(ConfigError, match=r"1\.0 GiB does not fit: 64\.0 MiB are free"):
        _start(tiny_world, kv_cache_memory="1GiB")
    assert _start(tiny_world, kv_cache_memory="1MiB").engine.memory.kv_bytes <= 1 << 20


def test_the_gpu_is_asked_after_the_allocator_gave_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def info(device: str) -> tuple[int, int]:
        calls.append(device)
        return 10, 100

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("give back"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", info)
    assert device_memory.device_memory("cuda:1") == DeviceMemory(10, 100)
    assert calls == ["give back", "cuda:1"]


def test_out_of_memory_in_a_load_refuses_that_load_only(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _start(tiny_world) as llm:
        lora = LoRARequest("a", 1, str(tiny_world.adapters["a"]))
        base = llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids
        llm.add_lora(lora)
        load: Callable[..., None] = llm.engine.runner.load
        failures = 1

        def full_once(which: AdapterLoad, weights: Any) -> None:
            nonlocal failures
            if failures:
                failures -= 1
                _full()
            load(which, weights)

        monkeypatch.setattr(llm.engine.loads, "_write", full_once)
        llm.engine.submit("with", PROMPT, GREEDY, [AdapterUse("a")])
        llm.engine.submit("without", PROMPT, GREEDY)
        deltas: list[Delta] = []
        while llm.engine.has_requests:
            news = llm.engine.step()
            deltas += news
            if not news and llm.engine.has_requests:
                llm.engine.wait()
        [failed] = [d for d in deltas if d.request_id == "with"]
        assert isinstance(failed.error, AdapterLoadFailed)
        assert "not enough memory to load adapter 'a'" in str(failed.error)
        assert "--gpu-memory-utilization" in str(failed.error)
        assert [t for d in deltas if d.request_id == "without" for t in d.token_ids] == base
        # There is memory again: the same adapter is served, and answers as it should.
        again = llm.generate([PROMPT], GREEDY, lora_request=lora)[0].outputs[0].token_ids
        llm.engine.check_integrity()
    with _start(tiny_world) as other:
        expected = other.generate([PROMPT], GREEDY, lora_request=lora)
        assert again == expected[0].outputs[0].token_ids


def test_serve_shows_the_table(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[Any] = []

    def serve_engine(engine: AsyncEngine, *_: object) -> int:
        served.append(engine)
        return 0

    monkeypatch.setattr(run, "serve_engine", serve_engine)
    settings = EngineConfig(model=str(tiny_world.model), device="cpu", kv_cache_memory="1MiB")
    assert run.serve(settings, ServerConfig(port=0)) == 0
    assert f"{served[0].memory.num_blocks:,} blocks" in capsys.readouterr().err
    served[0]._thread.close()
    served[0]._engine.close()


@pytest.mark.parametrize("terminal", [False, True])
def test_offline_the_table_is_for_terminals(
    tiny_world: TinyWorld,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    terminal: bool,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    caplog.set_level("INFO", "loramux.engine.engine")
    _start(tiny_world).close()
    assert ("Memory of cpu" in capsys.readouterr().err) is terminal
    assert any("KV cache" in message for message in caplog.messages)


def test_the_table_has_every_part(tiny_world: TinyWorld) -> None:
    with _start(tiny_world, kv_cache_memory="1MiB", max_model_len=32) as llm:
        plan = llm.engine.memory
        shown = io.StringIO()
        show(plan, Console(file=shown, width=160))
        assert plan.num_blocks == llm.engine.runner.num_blocks
        weights = sum(p.numel() for p in llm.engine.runner.attached.model.parameters()) * 4
        assert plan.weight_bytes > weights > 0
        assert llm.engine.stats().memory == plan.parts()
    text = shown.getvalue()
    for part in ("weights", "adapter pool", "KV cache", "graphs", "activations", "left free"):
        assert part in text
    assert "2 adapters of rank 16: 32 rows" in text
    assert f"{plan.num_blocks:,} blocks of 16 tokens: {plan.num_tokens:,} tokens" in text
    assert f"{plan.num_tokens / 32:,.1f} sequences of 32" in text
    assert "1.0 MiB" in text or "KiB" in text
