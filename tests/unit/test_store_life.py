"""What the store keeps of a version, and that nothing of it stays behind in any order of events."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loramux.adapters.store import AdapterStore
from loramux.config import EngineConfig, LoRAConfig
from loramux.errors import AdapterConflict, AdapterExists, AdapterNotFound
from loramux.models.loader import load_schema
from loramux.schema import ModelSchema
from loramux.types import AdapterUse
from tiny import TinyWorld

CONFIG = LoRAConfig(max_loras=2, max_lora_rank=8, max_cpu_loras=3)


@pytest.fixture(scope="module")
def schema(tiny_world: TinyWorld) -> ModelSchema:
    return load_schema(EngineConfig(model=str(tiny_world.model), lora=CONFIG)).schema


@pytest.fixture
def store(schema: ModelSchema) -> Iterator[AdapterStore]:
    store = AdapterStore(
        schema, CONFIG, torch.float32, reserved_names=[], on_gone=lambda digest: None
    )
    yield store
    store.close()


def is_empty(store: AdapterStore) -> bool:
    store._reader.submit(int).result()  # what was handed to it before has been done
    kept = (store.host.values(), store._sources, store._heads, store._spooled)
    return not any(kept) and store.spool.folders() == [] and store.host_bytes == 0


def test_what_is_read_for_a_version_that_has_gone_is_not_kept(
    store: AdapterStore, tiny_world: TinyWorld
) -> None:
    ref = store.add("x", str(tiny_world.adapters["a"]))
    store.host.drop(ref.digest)
    listener, gate = store.feed.listen(lambda: None), threading.Event()
    store._reader.submit(gate.wait)
    reading = store.fetch(ref)
    store.remove("x")
    gate.set()
    assert reading.result().ref.digest == ref.digest
    assert is_empty(store)
    assert [event.kind for event in listener.take()] == ["gone"]


def test_a_refused_publication_leaves_nothing(store: AdapterStore, tiny_world: TinyWorld) -> None:
    first = store.add("x", str(tiny_world.adapters["a"]))
    store.stage("x", str(tiny_world.adapters["b"]), replace=True, expected=first.digest)
    store.remove("x")
    with pytest.raises(AdapterConflict):
        store.publish("x")
    assert is_empty(store)
    store.add("x", str(tiny_world.adapters["b"]), expected="none")  # nobody holds the name


def test_a_version_is_read_again_from_its_newest_folder(
    store: AdapterStore, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    old, new = tmp_path / "old", store.spool.folder()
    shutil.copytree(tiny_world.adapters["a"], old)
    store.add("x", str(old))
    ((ref, _),) = store.registry.acquire([AdapterUse("x")])
    shutil.copytree(tiny_world.adapters["a"], new, dirs_exist_ok=True)
    store.add("y", str(new))
    shutil.rmtree(old)
    store.host.drop(ref.digest)
    assert ref.source == str(old) and store.fetch(ref).result().ref.digest == ref.digest
    store.registry.release([ref.digest])
    store.remove("x")
    assert store.spool.folders() == [new.name]
    store.remove("y")
    assert is_empty(store)


def test_any_mixture_of_changes_from_many_threads_leaves_nothing(
    store: AdapterStore, tiny_world: TinyWorld
) -> None:
    """Equal and other bytes under the same names, from folders and pushed, with readers between."""
    failures: list[BaseException] = []

    def change(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(25):
            name, version = rng.choice("xy"), tiny_world.adapters[rng.choice("ab")]
            try:
                if rng.random() < 0.3:
                    store.remove(name)
                elif rng.random() < 0.5:
                    folder = store.spool.folder()
                    shutil.copytree(version, folder, dirs_exist_ok=True)
                    try:
                        store.add(name, str(folder), replace=True)
                    except BaseException:
                        store.spool.drop(str(folder))
                        raise
                else:
                    store.add(name, str(version), replace=True)
            except (AdapterExists, AdapterNotFound):
                continue
            except BaseException as error:
                failures.append(error)

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            if (ref := store.registry.current(rng.choice("xy"))) is None:
                continue
            try:
                ((held, _),) = store.registry.acquire([AdapterUse(ref.name)])
            except Exception:  # it has gone between the two lines
                continue
            try:
                if rng.random() < 0.5:
                    store.host.drop(held.digest)
                assert store.fetch(held).result().ref.digest == held.digest
            except BaseException as error:
                failures.append(error)
            store.registry.release([held.digest])

    start = random.randrange(1 << 30)
    threads = [
        threading.Thread(target=work, args=(start + seed,))
        for seed, work in enumerate([change, change, change, read, read])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for name in store.registry.names():
        store.remove(name)
    assert is_empty(store)
    store.registry.check_integrity()
