"""Adapters from elsewhere into the cache: the Hub through a stand-in, fsspec through memory."""

from __future__ import annotations

import builtins
import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub import constants

from adapter_hub import AdapterHub
from loramux.adapters import downloads as downloads_module
from loramux.adapters import fsspec_files
from loramux.adapters.downloads import Downloads
from loramux.adapters.tokenizers import MOST_BYTES
from loramux.errors import AdapterNotFound, ConfigError, Forbidden, SourceUnavailable

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def make_files(folder: Path, size: int = 3 << 20) -> Path:
    """Files that nobody else has; what is in them plays no part here."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"id": uuid.uuid4().hex}))
    (folder / WEIGHTS).write_bytes(os.urandom(size))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "adapters"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[AdapterHub]:
    hub = AdapterHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield hub
    hub.close()


@pytest.fixture
def bucket(cache: Path) -> Iterator[str]:
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    system = fsspec.filesystem("memory")
    for path in list(system.store):
        if path.startswith(url.removeprefix("memory:/")):
            del system.store[path]


def upload(folder: Path, url: str) -> None:
    system = fsspec.filesystem("memory")
    for name, data in contents(folder).items():
        system.pipe_file(f"{url}/{name}", data)


def fetcher(max_bytes: int = 1 << 30, timeout_s: float = 30.0, **more: bool) -> Downloads:
    return Downloads(max_bytes, timeout_s, **more)


def nothing_partial(cache: Path) -> bool:
    partial = cache / "partial"
    return not partial.exists() or not list(partial.iterdir())


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def test_a_tokenizer_comes_along_where_it_is_wanted(
    hub: AdapterHub, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_files(tmp_path / "repo")
    for name in (*TOKENIZER, "tokenizer.model", "tokenization_own.py"):
        (folder / name).write_text(f"{name} of {uuid.uuid4()}")
    upload(folder, bucket)
    hub.repositories["org/one"] = {"main": folder}
    pinned = f"org/one@{hub.commit_of(folder)}"
    hub.repositories["org/one"][hub.commit_of(folder)] = folder
    for source in (bucket, "org/one", pinned):
        assert contents(fetcher().fetch(source).folder).keys() == {CONFIG, WEIGHTS}
        found = contents(fetcher(tokenizers=True).fetch(source).folder)
        assert found.keys() == {CONFIG, WEIGHTS, *TOKENIZER}, source
        assert found["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
        assert contents(fetcher().fetch(source).folder).keys() == {CONFIG, WEIGHTS}
    hub.requests.clear()
    fetcher(tokenizers=True).fetch(pinned)
    assert hub.requests == [], "a commit that is known needs no network"
    monkeypatch.setitem(MOST_BYTES, "chat_template.jinja", 10)
    with pytest.raises(Forbidden, match=r"chat_template\.jinja of .* larger than 10 bytes"):
        fetcher(tokenizers=True).fetch(bucket)


# --- the Hub -----------------------------------------------------------------------------------


def test_a_repository_is_fetched_once_by_commit(
    hub: AdapterHub, cache: Path, tmp_path: Path
) -> None:
    folder = make_files(tmp_path / "repo")
    (folder / "config.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"not needed")
    hub.repositories["org/one"] = {"main": folder}
    fetched = fetcher().fetch("org/one")
    commit = hub.commit_of(folder)
    assert fetched.origin == f"org/one@{commit}" and fetched.is_remote
    expected = contents(folder)
    del expected["optimizer.pt"]
    assert contents(fetched.folder) == expected
    assert cache in fetched.folder.parents and nothing_partial(cache)
    assert len(hub.bodies) == 3 and all(f"/{commit}/" in body for body in hub.bodies)

    hub.requests.clear()
    assert fetcher().fetch("org/one") == fetched, "asked, but not downloaded again"
    assert hub.requests and not hub.bodies
    hub.requests.clear()
    assert fetcher().fetch(f"org/one@{commit}") == fetched, "a commit cannot change"
    assert not hub.requests


def test_a_branch_that_moves_is_noticed(hub: AdapterHub, tmp_path: Path) -> None:
    hub.repositories["org/one"] = {"main": make_files(tmp_path / "old")}
    hub.repositories["org/one"]["v1"] = hub.repositories["org/one"]["main"]
    before = fetcher().fetch("org/one")
    hub.repositories["org/one"]["main"] = make_files(tmp_path / "new")
    after = fetcher().fetch("org/one")
    assert contents(after.folder) == contents(tmp_path / "new")
    assert fetcher().fetch("org/one@v1") == before, "an older revision, and its old content"
    assert contents(before.folder) == contents(tmp_path / "old")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/absent", "nor such a repository"),
        ("org/one@v9", "no revision 'v9'"),
        ("org/empty", "no adapter_config.json"),
        ("org/pickle", "loramux adapter convert"),
    ],
)
def test_what_the_hub_has_not(hub: AdapterHub, tmp_path: Path, source: str, message: str) -> None:
    hub.repositories["org/one"] = {"main": make_files(tmp_path / "one")}
    (tmp_path / "empty").mkdir()
    hub.repositories["org/empty"] = {"main": tmp_path / "empty"}
    pickle = make_files(tmp_path / "pickle")
    os.rename(pickle / WEIGHTS, pickle / "adapter_model.bin")
    hub.repositories["org/pickle"] = {"main": pickle}
    with pytest.raises(AdapterNotFound, match=message):
        fetcher().fetch(source)
    assert not hub.bodies


def test_the_token_is_sent_and_in_no_message(
    hub: AdapterHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub.repositories["org/private"] = {"main": make_files(tmp_path / "private")}
    hub.token = f"hf_{uuid.uuid4().hex}"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with caplog.at_level(logging.DEBUG), pytest.raises(AdapterNotFound):
        fetcher().fetch("org/private")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert fetcher().fetch("org/private").folder.is_dir()
    hub.failing = True
    with caplog.at_level(logging.DEBUG), pytest.raises(SourceUnavailable) as caught:
        fetcher().fetch("org/private")
    assert hub.token not in f"{caught.value}{caught.value.__cause__}{caplog.text}"


def test_spoiled_and_oversized_bodies_are_never_kept(
    hub: AdapterHub, cache: Path, tmp_path: Path
) -> None:
    hub.repositories["org/one"] = {"main": make_files(tmp_path / "one")}
    spoils = [
        lambda name, body: body[:-1] + bytes([body[-1] ^ 1]),
        lambda name, body: body[: len(body) // 2],
        lambda name, body: body + b"more",
    ]
    for spoil in spoils:
        hub.spoil = spoil
        with pytest.raises((SourceUnavailable, Forbidden)):
            fetcher().fetch("org/one")
        assert nothing_partial(cache) and not (cache / "content").exists()
    hub.spoil = lambda name, body: body
    assert contents(fetcher().fetch("org/one").folder) == contents(tmp_path / "one")


def test_too_large_is_refused_before_a_byte(hub: AdapterHub, tmp_path: Path) -> None:
    hub.repositories["org/one"] = {"main": make_files(tmp_path / "one", size=5000)}
    with pytest.raises(Forbidden, match="--max-adapter-download-bytes"):
        fetcher(max_bytes=4000).fetch("org/one")
    assert not hub.bodies


def test_offline_takes_what_is_kept_and_asks_nobody(
    hub: AdapterHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/one"] = {"main": make_files(tmp_path / "one")}
    fetched = fetcher().fetch("org/one")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetcher().fetch("org/one") == fetched and not hub.requests


def test_a_damaged_cache_is_noticed(hub: AdapterHub, tmp_path: Path) -> None:
    hub.repositories["org/one"] = {"main": make_files(tmp_path / "one")}
    folder = fetcher().fetch("org/one").folder
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[1234] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    again = fetcher().fetch("org/one").folder
    assert again == folder and contents(again) == contents(tmp_path / "one")
    shutil.rmtree(folder)
    assert contents(fetcher().fetch("org/one").folder) == contents(tmp_path / "one")


def test_many_at_once_do_not_clash(hub: AdapterHub, cache: Path, tmp_path: Path) -> None:
    names = [f"org/r{i}" for i in range(4)]
    for name in names:
        hub.repositories[name] = {"main": make_files(tmp_path / name, size=300_000)}
    hub.repositories["org/twin"] = hub.repositories["org/r0"]
    several = [fetcher() for _ in range(3)]  # as processes of their own would be
    asked = [(one, name) for name in (*names, "org/twin") for one in several] * 2
    with ThreadPoolExecutor(len(asked)) as threads:
        found = list(threads.map(lambda pair: (pair[1], pair[0].fetch(pair[1])), asked))
    for name, fetched in found:
        source = "org/r0" if name == "org/twin" else name
        assert contents(fetched.folder) == contents(tmp_path / source)
    assert len(list((cache / "content").iterdir())) == 4, "equal files are kept once"
    assert nothing_partial(cache)


# --- fsspec ------------------------------------------------------------------------------------


def test_a_bucket(bucket: str, cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    upload(make_files(tmp_path / "one"), bucket)
    fetched = fetcher().fetch(bucket)
    assert fetched.origin == bucket and contents(fetched.folder) == contents(tmp_path / "one")
    opened: list[str] = []
    plain = MemoryFileSystem._open
    monkeypatch.setattr(
        MemoryFileSystem, "_open", lambda *a, **k: (opened.append(a[1]), plain(*a, **k))[1]
    )
    assert fetcher().fetch(f"{bucket}/") == fetched and not opened
    upload(make_files(tmp_path / "two"), bucket)
    assert contents(fetcher().fetch(bucket).folder) == contents(tmp_path / "two")
    assert opened


def test_files_without_a_version_are_always_read(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(make_files(tmp_path / "one"), bucket)
    monkeypatch.setattr(fsspec_files, "_version_of", lambda info: None)
    fetcher().fetch(bucket)
    upload(make_files(tmp_path / "two"), bucket)  # of the same size
    assert contents(fetcher().fetch(bucket).folder) == contents(tmp_path / "two")


def test_files_that_change_meanwhile_are_never_mixed(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(make_files(tmp_path / "one"), bucket)
    plain = Downloads._download
    changes = [1]

    def downloading(self: Downloads, source: Any, files: Any, name: str, *rest: Any) -> Any:
        kept = plain(self, source, files, name, *rest)
        if name == CONFIG and changes[0]:
            changes[0] -= 1
            upload(make_files(tmp_path / f"new{changes[0]}"), bucket)
        return kept

    monkeypatch.setattr(Downloads, "_download", downloading)
    assert contents(fetcher().fetch(bucket).folder) == contents(tmp_path / "new0")
    changes[0] = 9
    upload(make_files(tmp_path / "three"), bucket)
    with pytest.raises(SourceUnavailable, match="change while they are read"):
        fetcher().fetch(bucket)


def test_missing_files_and_time(bucket: str, tmp_path: Path) -> None:
    upload(make_files(tmp_path / "one"), bucket)
    with pytest.raises(SourceUnavailable, match="--adapter-fetch-timeout-s"):
        fetcher(timeout_s=1e-9).fetch(bucket)
    fsspec.filesystem("memory").rm(f"{bucket}/{WEIGHTS}")
    with pytest.raises(AdapterNotFound, match=WEIGHTS):
        fetcher().fetch(bucket)


def test_close_ends_a_download(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(make_files(tmp_path / "one", size=4 << 20), bucket)
    begun, go_on = threading.Event(), threading.Event()
    plain = fsspec_files.FsspecFiles.chunks

    def slowly(self: Any, name: str) -> Iterator[bytes]:
        for chunk in plain(self, name):
            begun.set()
            assert go_on.wait(10)
            yield chunk

    monkeypatch.setattr(fsspec_files.FsspecFiles, "chunks", slowly)
    one = fetcher()
    with ThreadPoolExecutor(1) as threads:
        fetched = threads.submit(one.fetch, bucket)
        assert begun.wait(10)
        one.close()
        go_on.set()
        with pytest.raises(SourceUnavailable, match="given up"):
            fetched.result(10)


def test_a_missing_package_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("s3fs", "gcsfs"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'loramux\[s3\]'"):
        fetcher().fetch("s3://bucket/a")
    with pytest.raises(ConfigError, match="gcsfs"):
        fetcher().fetch("gs://bucket/a")
    with pytest.raises(ConfigError, match="no file system for nonsense://"):
        fetcher().fetch("nonsense://bucket/a")


def test_errors_of_a_file_system_keep_their_secrets(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = uuid.uuid4().hex

    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"https://host/?X-Amz-Signature={secret}")

    monkeypatch.setattr(MemoryFileSystem, "info", failing)
    with pytest.raises(SourceUnavailable) as caught:
        fetcher().fetch(bucket)
    assert secret not in str(caught.value) and caught.value.__cause__ is None


# --- either way --------------------------------------------------------------------------------


def test_a_full_disk_is_said_before(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(make_files(tmp_path / "one"), bucket)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(downloads_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SourceUnavailable, match="no room"):
        fetcher().fetch(bucket)


def test_partial_downloads_of_a_crash_are_cleared(bucket: str, cache: Path, tmp_path: Path) -> None:
    old, young = cache / "partial" / "old", cache / "partial" / "young"
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / WEIGHTS).write_bytes(b"half")
    os.utime(old, (1, 1))
    upload(make_files(tmp_path / "one"), bucket)
    fetcher().fetch(bucket)
    assert not old.exists() and young.exists()


def test_local_folders_stay_where_they_are(tmp_path: Path, cache: Path) -> None:
    folder = make_files(tmp_path / "local")
    fetched = fetcher().fetch(str(folder))
    assert fetched.folder == folder and not fetched.is_remote and not cache.exists()


def test_s3_itself(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against moto's server, where it and s3fs are installed."""
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    secret = uuid.uuid4().hex
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    _, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    system = s3fs.S3FileSystem(skip_instance_cache=True)
    system.mkdir("bucket")
    for version in ("one", "two"):
        folder = make_files(tmp_path / version)
        for name, data in contents(folder).items():
            system.pipe_file(f"bucket/a/{name}", data)
        for _ in range(2):
            assert contents(fetcher().fetch("s3://bucket/a").folder) == contents(folder)
    with pytest.raises(AdapterNotFound):
        fetcher().fetch("s3://bucket/none")
    server.stop()
    with pytest.raises(SourceUnavailable) as caught:
        fetcher().fetch("s3://bucket/a")
    assert secret not in str(caught.value)
