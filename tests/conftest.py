"""Shared by all tests: the tiny model, how many processes, and a skip where a GPU is not there."""

from __future__ import annotations

import os

import pytest

# Test processes share the cores. OpenMP reads this when torch is imported: threads that spin while
# they wait for the others would make two processes slower than one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Triton reads this when it is imported, and transformers does that: without a GPU it interprets.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tiny import TinyWorld, make_world


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("tiny"))


def num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """`-n auto`: no process but this one where the tests share a GPU; else xdist's own count."""
    return 0 if num_gpus() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needed = {"gpu": 1, "multigpu": 2}
    marked = [(item, name) for item in items for name in needed if item.get_closest_marker(name)]
    if not marked:
        return
    present = num_gpus()
    for item, name in marked:
        if present < needed[name]:
            reason = f"needs {needed[name]} CUDA device(s), and there are {present}"
            item.add_marker(pytest.mark.skip(reason=reason))
