"""What a text refers to: folders, repositories, URLs; and what is refused before anything is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux.adapters.sources import HubRepository, LocalFolder, RemoteFolder, parse_source
from loramux.errors import InvalidField

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("/a/b", LocalFolder(Path("/a/b"))),
        ("./a", LocalFolder(Path("a"))),
        ("plain", LocalFolder(Path("plain"))),
        ("a/b/c", LocalFolder(Path("a/b/c"))),
        ("file:///a%20b", LocalFolder(Path("/a b"))),
        ("org/name", HubRepository("org/name")),
        ("org/name@v1.0", HubRepository("org/name", "v1.0")),
        ("hf://org/name@refs/pr/1", HubRepository("org/name", "refs/pr/1")),
        (f"org/na.me_1-x@{COMMIT}", HubRepository("org/na.me_1-x", COMMIT)),
        ("s3://bucket/a/b/", RemoteFolder("s3", "s3://bucket/a/b")),
        ("S3://bucket/a", RemoteFolder("s3", "s3://bucket/a")),
        ("memory://x", RemoteFolder("memory", "memory://x")),
    ],
)
def test_texts(text: str, source: object) -> None:
    assert parse_source(text) == source


def test_a_folder_that_is_there_goes_before_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_source("org/name") == LocalFolder(Path("org/name"))
    assert parse_source("org/other") == HubRepository("org/other")


def test_only_commits_are_pinned() -> None:
    assert HubRepository("a/b", COMMIT).is_pinned
    assert not HubRepository("a/b", COMMIT[:39]).is_pinned and not HubRepository("a/b").is_pinned


@pytest.mark.parametrize(
    "text",
    [
        *("", "a\x00b", "a\nb", "x" * 5000, "file://host/a", "hf://name", "hf://org/name/folder"),
        *("s3://", "s3:///", "s3://bucket/a/../b", "s3://bucket/%2e%2e/b", "org/a--b", "org/a..b"),
        "s3://bucket/a::memory://b",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(InvalidField):
        parse_source(text)


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:hunter2@bucket/a",
        "https://host/a?X-Signature=hunter2",
        "https://host/a#hunter2",
        "https://hunter2@host/a",
    ],
)
def test_credentials_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidField) as caught:
        parse_source(url)
    assert "hunter2" not in str(caught.value) and "environment" in str(caught.value)
