"""The documentation is true: its pages are current, its links lead somewhere, its code runs.

Every ```python block must compile. One marked ```python run is executed, in the order of the page,
in one interpreter a page and from the repository's root, with the Hub id of the demo model replaced
by the local copy.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from code_tree import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Block(NamedTuple):
    page: Path
    line: int
    code: str
    runs: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match[2], match[1].split() == ["run"])
        for match in FENCE.finditer(text)
    ]


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]
PAGES_THAT_RUN = sorted({block.page for block in ALL_BLOCKS if block.runs})


@pytest.mark.parametrize("block", ALL_BLOCKS, ids=lambda b: f"{b.page.name}:{b.line}")
def test_python_blocks_compile(block: Block) -> None:
    ast.parse(block.code, filename=f"{block.page.name}:{block.line}")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


@pytest.fixture(scope="module")
def demo_model() -> str:
    """The folder of the demo model, fetched when it is not there yet."""
    script = [sys.executable, str(ROOT / "examples" / "demo_model.py")]
    return subprocess.run(script, capture_output=True, text=True, check=True).stdout.split("\n")[-2]


@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=lambda p: p.name)
def test_marked_blocks_run(page: Path, demo_model: str, tmp_path: Path) -> None:
    code = "\n".join(block.code for block in blocks(page) if block.runs)
    script = tmp_path / f"{page.stem}.py"
    script.write_text(code.replace(DEMO_MODEL, demo_model), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_configuration_page_is_current() -> None:
    script = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run `make docs`\n{done.stderr}"
