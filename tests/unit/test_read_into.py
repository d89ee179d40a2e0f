"""A file's bytes, by one thread and by several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loramux.adapters import files
from loramux.adapters.files import FileChanged, read_into


@pytest.fixture(params=["one thread", "several"])
def _readers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(files, "PIECE", 1000)
    if request.param == "one thread":
        monkeypatch.setattr(files, "copiers", lambda: None)
        yield
        return
    with ThreadPoolExecutor(3) as pool:
        monkeypatch.setattr(files, "copiers", lambda: pool)
        yield


@pytest.mark.usefixtures("_readers")
@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 12_345])
def test_bytes_come_as_they_stand(tmp_path: Path, count: int) -> None:
    data = os.urandom(count + 77)
    (tmp_path / "file").write_bytes(data)
    view = bytearray(count)
    with open(tmp_path / "file", "rb") as file:
        read_into(file.fileno(), 77, memoryview(view))
    assert bytes(view) == data[77:]


@pytest.mark.usefixtures("_readers")
def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(5_000))
    with open(tmp_path / "file", "rb") as file, pytest.raises(FileChanged, match="too early"):
        read_into(file.fileno(), 100, memoryview(bytearray(5_000)))
