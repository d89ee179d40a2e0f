"""What a module may need to be imported, shown by importing it where the rest is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest
from code_tree import ROOT

TORCH_FREE = (
    "loramux",
    "loramux.errors",
    "loramux.types",
    "loramux.status",
    "loramux.schema",
    "loramux.config",
    "loramux.content",
    "loramux.cli",
    "loramux.bench",
    "loramux.bench.throughput",
    "loramux.engine.plan",
    "loramux.engine.blocks",
    "loramux.engine.scheduler",
    "loramux.engine.fair_share",
    "loramux.engine.giving_way",
    "loramux.engine.rotation",
    "loramux.engine.default_adapters",
    "loramux.adapters.registry",
    "loramux.adapters.pool",
    "loramux.server.app",
    "loramux.replicas.affinity",
    "loramux.replicas.catalog",
    "loramux.replicas.front",
)
HEAVY = ("torch", "transformers", "tokenizers", "safetensors", "numpy")

# A worker of another system is started where nothing of loramux's dependencies is installed.
STDLIB_ONLY = ("loramux", "loramux.bench", "loramux.bench.worker", "loramux.bench.ours")
THIRD_PARTY = (*HEAVY, "pydantic", "fastapi", "rich", "prometheus_client", "uvicorn")


def import_without(blocked: tuple[str, ...], modules: tuple[str, ...]) -> None:
    """Import `modules` in a new interpreter in which `blocked` cannot be imported."""
    program = (
        f"import sys, importlib\nfor name in {blocked!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", TORCH_FREE)
def test_torch_free_modules_import_without_torch(module: str) -> None:
    import_without(HEAVY, (module,))


def test_bench_workers_need_only_the_standard_library() -> None:
    import_without(THIRD_PARTY, STDLIB_ONLY)


def test_all_is_exactly_the_public_names() -> None:
    """Each name in `__all__` can be had, `dir` shows these and no others, the order is fixed."""
    import loramux

    assert set(dir(loramux)) == set(loramux.__all__)
    assert len(set(loramux.__all__)) == len(loramux.__all__)
    assert all(getattr(loramux, name) is not None for name in loramux.__all__)
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = loramux.NoSuchName
