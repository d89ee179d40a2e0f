"""Names of strangers into sources: nothing outside the roots and the patterns, whatever the name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loramux.adapters import resolvers
from loramux.adapters.resolvers import Refusals, Resolver
from loramux.errors import ConfigError, UnknownModel

CONFIG = "adapter_config.json"


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text("{}")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root, with good adapters, links and traps; what lies outside must never be found."""
    root = tmp_path / "root"
    make(root / "good")
    make(root / "team" / "deep.v1")
    (root / "empty").mkdir()
    make(root / ".hidden")
    outside = make(tmp_path / "outside")
    make(tmp_path / "root-sibling")
    (root / "link-out").symlink_to(outside)
    (root / "link-up").symlink_to("..")
    (root / "link-self").symlink_to("link-self")
    (root / "link-in").symlink_to("good")
    shutil.copytree(root / "good", root / "file-out")
    (root / "file-out" / "adapter_model.safetensors").symlink_to(outside / CONFIG)
    (root / CONFIG).write_text("{}")
    return root


def test_names_below_a_root(root: Path) -> None:
    resolver = Resolver([str(root)], [])
    for name in ("good", "team/deep.v1"):
        assert resolver.find(name) == [str(root / name)]
    assert resolver.find("link-in") == [str(root / "good")]


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../outside", "good/../../outside", "/good", "//good", "good/", "good//"),
        *("team", "empty", "absent", ".hidden", "link-out", "link-up/outside"),
        *(
            "link-self",
            "file-out",
            "good\x00",
            "\x00",
            "good\n",
            "good%2e",
            "..%2foutside",
            "~root",
        ),
        *(
            "\N{FULLWIDTH FULL STOP}" * 2,
            "\N{TWO DOT LEADER}/outside",
            "go\N{COMBINING ACUTE ACCENT}od",
        ),
        *("\N{DIVISION SLASH}outside", "g\N{CYRILLIC SMALL LETTER O}od", "\udcff", "x" * 129),
        *("good\\..\\outside", "a/" * 64, "adapter_config.json", "file:///good", "good "),
    ],
)
def test_names_that_find_nothing(root: Path, name: str) -> None:
    assert Resolver([str(root)], []).find(name) == []


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.one_of(
        st.text(max_size=200),
        st.lists(
            st.sampled_from(
                ["..", ".", "/", "good", "link-up", "outside", "root", "\x00", "%2e", "~"]
            ),
            max_size=8,
        ).map("".join),
    )
)
def test_no_name_leaves_the_root(root: Path, name: str) -> None:
    for found in Resolver([str(root)], []).find(name):
        assert os.path.realpath(found) == found and found.startswith(f"{root}{os.sep}")


def test_the_first_root_wins_and_others_follow(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make(other / "good")
    make(other / "only")
    resolver = Resolver([str(root), str(other), "memory://bucket/adapters"], ["org/*"])
    assert resolver.find("good") == [str(root / "good")]
    assert resolver.find("only") == [str(other / "only")]
    assert resolver.find("org/x") == ["memory://bucket/adapters/org/x", "hf://org/x"]


def test_a_root_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--adapter-roots"):
        Resolver([str(tmp_path / "absent")], [])


@pytest.mark.parametrize(
    ("patterns", "name", "found"),
    [
        (["org/*"], "org/any", ["hf://org/any"]),
        (["org/lora-*"], "org/lora-a", ["hf://org/lora-a"]),
        (["org/lora-*"], "org/other", []),
        (["org/one@v1", "org/*"], "org/one", ["hf://org/one@v1"]),
        (["org/*"], "organ/any", []),
        (["org/*"], "Org/any", []),
        (["org/*"], "org/a/b", []),
        (["org/*"], "other/org/a", []),
        (["org/*"], "org/any@refs/pr/1", []),
        (["org/*"], "org/any@main", []),
        (["org/*"], "org/../other/x", []),
    ],
)
def test_patterns(patterns: list[str], name: str, found: list[str]) -> None:
    assert Resolver([], patterns).find(name) == found


def test_refusals_are_kept_for_a_time_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    refusals = Refusals(5.0, clock=lambda: now[0])
    error = UnknownModel("no")
    refusals.put("a", error)
    now[0] = 4.9
    assert refusals.get("a") is error and refusals.get("b") is None
    now[0] = 5.0
    assert refusals.get("a") is None
    monkeypatch.setattr(resolvers, "MOST_REFUSALS", 3)
    for name in "abcd":
        refusals.put(name, error)
    assert [refusals.get(name) for name in "abcd"] == [None, error, error, error]
