"""Format, lint, types and import contracts, as tests: so one command says whether all is well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from code_tree import ROOT

BIN = Path(sys.executable).parent
CODE = ("src", "tests", "bench", "docs", "examples")

TOOLS = {
    "format": ("ruff", "format", "--check", *CODE),
    "ruff": ("ruff", "check", *CODE),
    "mypy": ("mypy",),
    "imports": ("lint-imports", "--no-logo"),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_has_no_complaint(tool: str) -> None:
    name, *arguments = TOOLS[tool]
    done = subprocess.run(
        [str(BIN / name), *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
