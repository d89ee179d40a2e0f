"""Shared by all tests: the tiny model, and a skip where a marker asks for a GPU that is not there."""

from __future__ import annotations

import os

import pytest
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
