"""Files: only regular ones inside the allowed folders, whatever links and names say."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from loramux.config import MediaConfig
from loramux.errors import BadMedia, Forbidden, MediaUnavailable
from loramux.media import LocalFile
from loramux.media.files import read_file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "inner").mkdir(parents=True)
    (tmp_path / "root-too").mkdir()
    (tmp_path / "root-too" / "secret.png").write_bytes(b"secret")
    return tmp_path / "root"


@pytest.fixture
def config(root: Path) -> MediaConfig:
    return MediaConfig(allowed_media_roots=[str(root)], max_media_bytes=100)


def test_absolute_and_relative_paths(root: Path, config: MediaConfig) -> None:
    data = random.randbytes(100)
    (root / "inner" / "a b.png").write_bytes(data)
    for path in ("inner/a b.png", str(root / "inner" / "a b.png"), "inner/../inner/a b.png"):
        assert read_file(LocalFile(path), config) == data


def test_nothing_is_allowed_by_default(root: Path) -> None:
    (root / "a.png").write_bytes(b"a")
    with pytest.raises(Forbidden, match="allowed_media_roots"):
        read_file(LocalFile(str(root / "a.png")), MediaConfig())


@pytest.mark.parametrize(
    "path",
    [
        "../root-too/secret.png",
        "/etc/passwd",
        "..",
        ".",
        "",
        "/",
        "../nothing",
        "/proc/self/environ",
    ],
)
def test_what_lies_outside(path: str, config: MediaConfig) -> None:
    with pytest.raises(Forbidden):
        read_file(LocalFile(path), config)


def test_a_folder_whose_name_begins_like_the_root(root: Path, config: MediaConfig) -> None:
    with pytest.raises(Forbidden):
        read_file(LocalFile(f"{root}-too/secret.png"), config)


def test_links_may_not_leave_the_root(root: Path, config: MediaConfig) -> None:
    (root / "file.png").symlink_to(root.parent / "root-too" / "secret.png")
    (root / "folder").symlink_to(root.parent / "root-too")
    (root / "inner" / "good.png").write_bytes(b"good")
    (root / "good.png").symlink_to("inner/good.png")
    for path in ("file.png", "folder/secret.png", str(root / "folder" / "secret.png")):
        with pytest.raises(Forbidden):
            read_file(LocalFile(path), config)
    assert read_file(LocalFile("good.png"), config) == b"good"


def test_a_link_put_there_after_the_check_is_not_followed(
    root: Path, config: MediaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a.png").symlink_to(root.parent / "root-too" / "secret.png")
    monkeypatch.setattr(os.path, "realpath", os.path.abspath)  # as if it were a file a moment ago
    with pytest.raises(MediaUnavailable):
        read_file(LocalFile("a.png"), config)


def test_roots_may_be_links_and_are_tried_in_turn(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    roots = [str(tmp_path / "root-too"), str(tmp_path / "link")]
    (root / "a.png").write_bytes(b"second")
    config = MediaConfig(allowed_media_roots=roots)
    assert read_file(LocalFile("a.png"), config) == b"second"
    (tmp_path / "root-too" / "a.png").write_bytes(b"first")
    assert read_file(LocalFile("a.png"), config) == b"first"


def test_what_is_not_there_or_no_file(root: Path, config: MediaConfig) -> None:
    os.mkfifo(root / "fifo")
    (root / "loop").symlink_to("loop")
    for path in ("nothing.png", "inner", "fifo", "loop", "a" * 300, "fifo/x"):
        with pytest.raises(MediaUnavailable):
            read_file(LocalFile(path), config)
    with pytest.raises(Forbidden):
        read_file(LocalFile("a\0b"), config)


def test_a_large_file_is_not_read_whole(root: Path, config: MediaConfig) -> None:
    with open(root / "large.png", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadMedia, match="100 bytes"):
        read_file(LocalFile("large.png"), config)
