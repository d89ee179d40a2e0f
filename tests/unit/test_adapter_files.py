"""The host form of an adapter, and reading it again: which files are trusted, which are not."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux.adapters import store as store_module
from loramux.adapters.host_cache import HostMemory
from loramux.adapters.peft import read_adapter
from loramux.adapters.store import AdapterStore
from loramux.adapters.weights import place
from loramux.config import EngineConfig, LoRAConfig
from loramux.errors import AdapterLoadFailed, AdapterRejected
from loramux.models.loader import load_schema
from loramux.schema import ModelSchema
from tiny import TinyWorld

CONFIG = LoRAConfig(max_lora_rank=8, max_loras=1, max_cpu_loras=1)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def schema(tiny_world: TinyWorld) -> ModelSchema:
    return load_schema(EngineConfig(model=str(tiny_world.model), lora=CONFIG)).schema


@pytest.fixture
def folder(tiny_world: TinyWorld, tmp_path: Path) -> Path:
    return _settle(Path(shutil.copytree(tiny_world.adapters["a"], tmp_path / "adapter")))


@pytest.fixture
def store(schema: ModelSchema, folder: Path, tiny_world: TinyWorld) -> Iterator[AdapterStore]:
    """Room for one adapter in host memory, and that is another: `a` must be read again."""
    made = AdapterStore(
        schema, CONFIG, torch.float32, reserved_names=[], on_gone=lambda digest: None
    )
    made.add("a", str(folder))
    made.add("b", str(tiny_world.adapters["b"]))
    yield made
    made.close()


def _settle(folder: Path) -> Path:
    """Give the files an age at which their times can be trusted."""
    before = time.time() - 100
    for name in ("adapter_config.json", WEIGHTS):
        os.utime(folder / name, (before, before))
    return folder


def _same(left: Any, right: Any) -> bool:
    return left.pairs.keys() == right.pairs.keys() and all(
        torch.equal(left.pairs[m].a, right.pairs[m].a)
        and torch.equal(left.pairs[m].b, right.pairs[m].b)
        and left.pairs[m].scale == right.pairs[m].scale
        for m in left.pairs
    )


@pytest.fixture
def full_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the adapters that were checked and hashed from here on."""
    names: list[str] = []

    def counted(name: str, *args: Any) -> Any:
        names.append(name)
        return read_adapter(name, *args)

    monkeypatch.setattr(store_module, "read_adapter", counted)
    return names


# --- the host form -----------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_buffer_is_the_file(folder: Path, schema: ModelSchema, stored: torch.dtype) -> None:
    tensors = {key: value.to(stored) for key, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    weights, _ = read_adapter("a", folder, schema, CONFIG, torch.float32)
    data = (folder / WEIGHTS).read_bytes()
    assert bytes(weights.buffer.numpy()) == data[8 + int.from_bytes(data[:8], "little") :]
    assert len(weights.layout.runs) == 1
    assert weights.ref.num_bytes == sum(value.numel() for value in tensors.values()) * 4
    inside = range(weights.buffer.data_ptr(), weights.buffer.data_ptr() + weights.buffer.numel())
    for module, pair in weights.pairs.items():
        for half, factor in (("A", pair.a), ("B", pair.b.t())):
            want = tensors[f"base_model.model.{module}.lora_{half}.weight"]
            assert factor.dtype == stored and torch.equal(factor, want)
            assert factor.is_contiguous() and factor.data_ptr() in inside


def test_types_may_differ_within_a_file(folder: Path, schema: ModelSchema) -> None:
    types = (torch.bfloat16, torch.float32, torch.float16)
    stored = load_file(folder / WEIGHTS)
    tensors = {key: stored[key].to(types[i % 3]) for i, key in enumerate(sorted(stored))}
    save_file({key: value.clone() for key, value in tensors.items()}, folder / WEIGHTS)
    weights, _ = read_adapter("a", folder, schema, CONFIG, torch.float32)
    for module, pair in weights.pairs.items():
        for half, factor in (("A", pair.a), ("B", pair.b.t())):
            want = tensors[f"base_model.model.{module}.lora_{half}.weight"]
            assert factor.dtype == want.dtype and torch.equal(factor, want)


def test_places_are_aligned_and_runs_join() -> None:
    assert place([(100, 8, 4), (108, 4, 2), (112, 8, 4)]) == ([0, 8, 12], [(100, 0, 20)])
    offsets, runs = place([(100, 6, 2), (106, 8, 4), (114, 8, 4)])
    assert offsets == [0, 8, 16]
    assert runs == [(100, 0, 6), (106, 8, 16)]


@pytest.mark.parametrize(("value", "fits"), [(65519.0, True), (65520.0, False), (-1e6, False)])
def test_the_largest_half_is_the_limit(
    folder: Path, schema: ModelSchema, value: float, fits: bool
) -> None:
    tensors = load_file(folder / WEIGHTS)
    key = sorted(tensors)[3]
    tensors[key].view(-1)[5] = value
    save_file(tensors, folder / WEIGHTS)
    if fits:
        read_adapter("a", folder, schema, CONFIG, torch.float16)
        return
    with pytest.raises(AdapterRejected, match="overflows in torch") as caught:
        read_adapter("a", folder, schema, CONFIG, torch.float16)
    assert key in caught.value.reasons[0]


# --- reading again -----------------------------------------------------------------------------


def test_unchanged_files_are_read_without_checking(
    store: AdapterStore, folder: Path, schema: ModelSchema, full_reads: list[str]
) -> None:
    ref, reads = store.registry.current("a"), store.reads
    assert ref is not None and ref.digest not in store.host
    weights = store.fetch(ref).result()
    assert full_reads == [] and store.reads == reads + 1
    assert weights.ref == ref and ref.digest in store.host
    assert _same(weights, read_adapter("a", folder, schema, CONFIG, torch.float32)[0])


def test_touched_files_are_checked_and_served(
    store: AdapterStore, folder: Path, full_reads: list[str]
) -> None:
    ref = store.registry.current("a")
    assert ref is not None
    for name in (WEIGHTS, "adapter_config.json"):
        os.utime(folder / name)
        assert store.fetch(ref).result().ref.digest == ref.digest
        store.host.drop(ref.digest)
        _settle(folder)
    assert full_reads == ["a", "a"]


def _replace(folder: Path, world: TinyWorld) -> None:
    """Another file of the same size, and the same time, under the same name."""
    times = (folder / WEIGHTS).stat()
    shutil.copyfile(world.adapters["d"] / WEIGHTS, folder / "new")
    os.utime(folder / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (folder / "new").stat().st_size == times.st_size
    os.replace(folder / "new", folder / WEIGHTS)


def _overwrite(folder: Path, world: TinyWorld) -> None:
    """Other bytes in the same file, whose time is put back."""
    times = (folder / WEIGHTS).stat()
    with open(folder / WEIGHTS, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(folder / WEIGHTS, ns=(times.st_atime_ns, times.st_mtime_ns))


def _rescale(folder: Path, world: TinyWorld) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 99}))


@pytest.mark.parametrize("change", [_replace, _overwrite, _rescale])
def test_changed_files_are_an_error(
    store: AdapterStore, folder: Path, tiny_world: TinyWorld, change: Any, full_reads: list[str]
) -> None:
    ref = store.registry.current("a")
    assert ref is not None
    change(folder, tiny_world)
    with pytest.raises(AdapterLoadFailed, match="have changed"):
        store.fetch(ref).result()
    assert full_reads == ["a"]


def test_truncated_and_missing_files_are_an_error(store: AdapterStore, folder: Path) -> None:
    ref = store.registry.current("a")
    assert ref is not None
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 10)
    with pytest.raises(AdapterLoadFailed, match="damaged or truncated"):
        store.fetch(ref).result()
    shutil.rmtree(folder)
    with pytest.raises(AdapterLoadFailed, match="no adapter folder"):
        store.fetch(ref).result()


def test_times_of_a_moment_ago_prove_nothing(
    store: AdapterStore, folder: Path, full_reads: list[str]
) -> None:
    """A second write within one tick of the file system's clock would leave the same time."""
    os.utime(folder / WEIGHTS)
    store.add("fresh", str(folder))
    ref = store.registry.current("fresh")
    assert ref is not None
    store.host.drop(ref.digest)
    assert store.fetch(ref).result().ref.digest == ref.digest
    assert full_reads == ["fresh", "fresh"]


def test_a_version_that_is_gone_leaves_nothing(store: AdapterStore) -> None:
    store.remove("a")
    store.remove("b")
    assert store._sources == {} and len(store.host) == 0


# --- the memory --------------------------------------------------------------------------------


def test_memory_is_used_again_once_nobody_has_it() -> None:
    memory = HostMemory()
    first = torch.frombuffer(memory.take(10_000), dtype=torch.uint8)
    address = first.data_ptr()
    view = first[10:20]
    del first
    gc.collect()
    other = memory.take(10_000)  # a view of the first is alive, so this is new
    assert torch.frombuffer(other, dtype=torch.uint8).data_ptr() != address
    view.fill_(7)
    del view
    again = torch.frombuffer(memory.take(9_000), dtype=torch.uint8)
    assert again.data_ptr() == address and again.numel() == 9_000


def test_memory_far_too_large_is_not_kept_for_a_small_one() -> None:
    memory = HostMemory()
    large = torch.frombuffer(memory.take(1 << 20), dtype=torch.uint8)
    address = large.data_ptr()
    del large
    small = torch.frombuffer(memory.take(1 << 12), dtype=torch.uint8)
    assert small.data_ptr() != address
