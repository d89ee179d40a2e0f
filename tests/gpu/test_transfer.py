"""Adapters reach the GPU beside a busy stream: right bytes, and nobody waits for the device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from loramux.adapters.peft import read_adapter
from loramux.adapters.weights import AdapterWeights
from loramux.config import EngineConfig, LoRAConfig
from loramux.engine.plan import AdapterLoad
from loramux.errors import AdapterLoadFailed
from loramux.kernels import LoRASite
from loramux.models.loader import load_schema
from loramux.schema import ModelSchema
from tiny import TinyWorld

pytestmark = pytest.mark.gpu
POOL_ROWS = 32
CONFIG = LoRAConfig(max_lora_rank=8, max_loras=4)
BUSY_CYCLES = 2_000_000_000  # about a second


@pytest.fixture(scope="module")
def schema(tiny_world: TinyWorld) -> ModelSchema:
    return load_schema(EngineConfig(model=str(tiny_world.model), lora=CONFIG)).schema


@contextmanager
def _no_device_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _sites(schema: ModelSchema, dtype: torch.dtype) -> list[LoRASite]:
    """A pool for the model, on the GPU, full of NaN."""
    widths: dict[int, dict[int, int]] = {}
    features: dict[int, int] = {}
    for module in schema.modules.values():
        widths.setdefault(module.site, {})[module.slice_index] = module.out_features
        features[module.site] = module.in_features
    sites = []
    for index in sorted(widths):
        starts = [0]
        for slice_index in sorted(widths[index]):
            starts.append(starts[-1] + widths[index][slice_index])
        slices = len(starts) - 1
        a = torch.full((POOL_ROWS, slices, features[index]), torch.nan, dtype=dtype, device="cuda")
        sites.append(
            LoRASite(
                a=a.transpose(0, 1),  # [S, R, in]
                b=torch.full((POOL_ROWS, starts[-1]), torch.nan, dtype=dtype, device="cuda"),
                slice_starts=tuple(starts),
                row_r=torch.full((slices, POOL_ROWS), -1, dtype=torch.int32, device="cuda"),
                row_scale=torch.full((slices, POOL_ROWS), torch.nan, device="cuda"),
            )
        )
    return sites


def _twin(
    sites: list[LoRASite], schema: ModelSchema, load: AdapterLoad, weights: AdapterWeights
) -> None:
    from loramux.kernels.triton_scatter import SliceSource, scatter_reference

    sources = {}
    for name, pair in weights.layout.pairs.items():
        module = schema.modules[name]
        sources[module.site, module.slice_index] = SliceSource(
            pair.a.offset, pair.a.dtype, pair.b.offset, pair.b.dtype, pair.a.rows, pair.scale
        )
    scatter_reference(sites, weights.buffer.cuda(), sources, load.first_row, load.ref.max_r)


def _assert_same(got: list[LoRASite], want: list[LoRASite]) -> None:
    for mine, twin in zip(got, want, strict=True):
        for name in ("a", "b", "row_r", "row_scale"):
            left, right = getattr(mine, name), getattr(twin, name)
            assert torch.equal(left.isnan(), right.isnan()), name
            assert torch.equal(left.nan_to_num(), right.nan_to_num()), name


def _fill_with_nan(sites: list[LoRASite]) -> None:
    for site in sites:
        site.row_r.fill_(-1)
        for tensor in (site.a, site.b, site.row_scale):
            tensor.fill_(torch.nan)


def _read(name: str, path: Path, schema: ModelSchema) -> AdapterWeights:
    return read_adapter(name, path, schema, CONFIG, torch.float32)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loads_while_the_main_stream_is_busy(
    tiny_world: TinyWorld, schema: ModelSchema, dtype: torch.dtype
) -> None:
    from loramux.engine.device_loader import DeviceLoader

    sites, twins = _sites(schema, dtype), _sites(schema, dtype)
    device = torch.device("cuda", torch.cuda.current_device())
    # Chunks so small that the ring goes round many times.
    loader = DeviceLoader(device, sites, schema, chunk_bytes=4096, chunks=3)
    loads = []
    for row, name in zip((3, 11, 19, 7), "abcd", strict=True):
        weights = _read(name, tiny_world.adapters[name], schema)
        loads.append((AdapterLoad(weights.ref, row), weights))
    for load, weights in loads:
        loader.load(load, weights)  # compiles the kernel, which may take longer than what follows
    _fill_with_nan(sites)
    with _no_device_sync():
        torch.cuda._sleep(BUSY_CYCLES)
        busy = torch.cuda.Event()
        busy.record()
        for load, weights in loads:
            loader.load(load, weights)
            assert not busy.query(), "the load waited for the main stream"
    for load, weights in loads:
        _twin(twins, schema, load, weights)
    _assert_same(sites, twins)


def test_rows_are_written_after_the_step_that_may_read_them(
    tiny_world: TinyWorld, schema: ModelSchema
) -> None:
    from loramux.engine.device_loader import DeviceLoader

    sites = _sites(schema, torch.float32)
    loader = DeviceLoader(torch.device("cuda", 0), sites, schema)
    weights = _read("a", tiny_world.adapters["a"], schema)
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES // 4)
    seen = sites[0].a.clone()  # [S, R, in]: a step that still reads what stood there
    step = torch.cuda.Event()
    step.record()
    started = time.perf_counter()
    loader.load(AdapterLoad(weights.ref, 0), weights, after=step)
    assert step.query() and time.perf_counter() - started > 0.02
    assert bool(seen.isnan().all())
    assert not bool(sites[0].a[0, :4].isnan().any())


def test_memory_that_does_not_suffice_refuses_one_load(
    tiny_world: TinyWorld, schema: ModelSchema, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loramux.engine import device_loader

    sites, twins = _sites(schema, torch.bfloat16), _sites(schema, torch.bfloat16)
    loader = device_loader.DeviceLoader(torch.device("cuda", 0), sites, schema)
    weights = _read("b", tiny_world.adapters["b"], schema)
    load = AdapterLoad(dataclasses.replace(weights.ref), 8)
    with monkeypatch.context() as patch:
        patch.setattr(device_loader, "STAGING_STEP", 1 << 50)
        with pytest.raises(AdapterLoadFailed, match="gpu_memory_utilization"):
            loader.load(load, weights)
    loader.load(load, weights)
    _twin(twins, schema, load, weights)
    _assert_same(sites, twins)
