"""What may not be in the repository, and what must agree between its files."""

from __future__ import annotations

import re
import tomllib

import pytest
from code_tree import ROOT, tracked_files

# Folders of somebody's machine. Written in pieces, so that this file does not contain them.
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:" + "|".join(("root", "home", "Users")) + r")/\w")
ENDINGS = {".py", ".md", ".toml", ".txt", ".json", ".jsonl", ".cpp", ".h", ".yaml", ".yml", ""}
MAX_BYTES = 8 << 20
PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".bin"}


def requirement_names(requirements: list[str]) -> set[str]:
    names = (re.match(r"[A-Za-z0-9_.-]+", text) for text in requirements)
    return {re.sub(r"[-_.]+", "-", name[0]).lower() for name in names if name}


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_no_paths_of_a_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked_files()
        if path.suffix in ENDINGS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATHS.search(line)
    ]
    assert not found, "\n".join(found)


def test_no_pickles_and_no_large_files() -> None:
    for path in tracked_files():
        assert path.suffix not in PICKLES, path
        assert path.stat().st_size <= MAX_BYTES, path


def test_every_direct_dependency_is_bounded_and_pinned(project: dict) -> None:
    extras = [line for group in project["optional-dependencies"].values() for line in group]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    assert requirement_names(project["dependencies"] + extras) <= requirement_names(pins)
    unbounded = [line for line in project["dependencies"] + extras if ">=" not in line]
    assert not unbounded


def test_every_dependency_has_a_reason(project: dict) -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    named = {word.lower().replace("_", "-") for word in re.findall(r"^\| `([^`]+)`", page, re.M)}
    assert requirement_names(project["dependencies"]) <= named


def test_version_is_the_same_everywhere(project: dict) -> None:
    import loramux

    assert loramux.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
