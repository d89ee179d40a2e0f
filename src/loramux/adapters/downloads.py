"""Adapters from elsewhere as folders of this machine: downloaded once, kept by their content.

    $LORAMUX_CACHE/adapters/content/<SHA-256 of the files>/adapter_config.json, ...
                            sources/<SHA-256 of the source>.json    which content, and its stamps
                            partial/<random>/                       downloads that are not whole yet

A folder appears under `content` whole or not at all. Two that download the same do not disturb each
other: who comes second finds the folder and drops its own. What is found is hashed before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loramux.adapters.fsspec_files import FsspecFiles
from loramux.adapters.hub_files import HubFiles, is_offline
from loramux.adapters.remote_files import (
    CHUNK_BYTES,
    OPTIONAL_FILES,
    TOKENIZER_FILES,
    FileStamp,
    RemoteFiles,
    most_bytes,
)
from loramux.adapters.sources import HubRepository, LocalFolder, RemoteFolder, parse_source
from loramux.errors import Forbidden, SourceUnavailable

STRIPES = 64
STALE_S = 24 * 3600.0  # a partial download of this age belongs to nobody


@dataclass(frozen=True, slots=True)
class Fetched:
    """A folder with an adapter's files, and where they are from: for a local one, the same."""

    folder: Path
    origin: str

    @property
    def is_remote(self) -> bool:
        return self.origin != str(self.folder)


@dataclass(frozen=True, slots=True)
class _File:
    """A file as it was kept."""

    size: int
    sha256: str


def adapter_cache() -> Path:
    """$LORAMUX_CACHE, $XDG_CACHE_HOME/loramux or ~/.cache/loramux, and in it `adapters`."""
    if own := os.environ.get("LORAMUX_CACHE"):
        return Path(own) / "adapters"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "loramux" / "adapters"


class Downloads:
    """Fetches sources; safe to call from any thread, and beside other processes."""

    def __init__(self, max_bytes: int, timeout_s: float, *, tokenizers: bool = False):
        """`max_bytes` of all files of one adapter, `timeout_s` for all of them. With `tokenizers`, an
        adapter's own tokenizer and chat template come along."""
        self._optional = (*OPTIONAL_FILES, *(TOKENIZER_FILES if tokenizers else ()))
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._closed = threading.Event()
        self._locks = [threading.Lock() for _ in range(STRIPES)]  # equal sources share one

    def close(self) -> None:
        """End the downloads that are under way."""
        self._closed.set()

    def fetch(self, text: str) -> Fetched:
        """The adapter that `text` refers to (see `sources`), as a folder. Blocks.

        A source that was fetched before is asked whether it has changed, but for a commit of the Hub.
        Raises InvalidField, AdapterNotFound, Forbidden where a cap is passed, SourceUnavailable, or
        ConfigError where a package is missing. A local folder need not be there.
        """
        source = parse_source(text)
        if isinstance(source, LocalFolder):
            return Fetched(source.path, str(source.path))
        key = self._key(source)
        with self._locks[int(key[:8], 16) % STRIPES]:
            try:
                return self._fetch_remote(source, key)
            except OSError as error:
                raise SourceUnavailable(
                    f"{source} cannot be kept in {adapter_cache()}: {error.strerror or error}",
                    field="lora_path",
                    remedy="make room there, or set LORAMUX_CACHE",
                ) from error

    def _fetch_remote(self, source: HubRepository | RemoteFolder, key: str) -> Fetched:
        cache = _Cache(adapter_cache())
        deadline_s = time.monotonic() + self._timeout_s
        may_ask = not (isinstance(source, HubRepository) and (source.is_pinned or is_offline()))
        if not may_ask and (known := cache.find(key, None)) is not None:
            return known
        files: RemoteFiles = (
            HubFiles(source, self._optional)
            if isinstance(source, HubRepository)
            else FsspecFiles(source, self._optional)
        )
        for _ in range(2):  # what is replaced while it is read is read once more
            stamps = files.stamps()
            self._check_sizes(source, stamps)
            if (known := cache.find(key, stamps)) is not None:
                return known
            with cache.partial() as folder:
                kept = {
                    name: self._download(source, files, name, stamp, folder / name, deadline_s)
                    for name, stamp in stamps.items()
                }
                if files.may_change and files.stamps() != stamps:
                    continue
                digest = cache.keep(folder, kept)
            for each in {key, self._key(files.origin)}:
                cache.remember(each, files.origin, digest, stamps, kept)
            return Fetched(cache.content(digest), files.origin)
        raise SourceUnavailable(
            f"the files of {source} change while they are read",
            field="lora_path",
            remedy="write a new version into a new folder",
        )

    def _key(self, source: object) -> str:
        """What is known of a source without its tokenizer says nothing of it with that."""
        more = "" if self._optional == OPTIONAL_FILES else " with its tokenizer"
        return hashlib.sha256(f"{source}{more}".encode()).hexdigest()

    def _check_sizes(self, source: object, stamps: Mapping[str, FileStamp]) -> None:
        """Refuse what is too large, or has no room here, before a byte is read."""
        total = sum(stamp.size for stamp in stamps.values())
        if total > self._max_bytes:
            raise self._too_large(source, f"has {total} bytes")
        for name, stamp in stamps.items():
            most = most_bytes(name)
            if most is not None and stamp.size > most:
                own = name in TOKENIZER_FILES
                raise Forbidden(
                    f"{name} of {source} is larger than {most} bytes",
                    field="lora_path",
                    remedy="start with --lora-tokenizers base" if own else None,
                )
        root = adapter_cache()
        root.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(root).free < total:
            raise SourceUnavailable(
                f"{source} has {total} bytes, and there is no room for them in {root}",
                field="lora_path",
                remedy="make room there, or set LORAMUX_CACHE",
            )

    def _too_large(self, source: object, what: str) -> Forbidden:
        return Forbidden(
            f"{source} {what}, and max_adapter_download_bytes is {self._max_bytes}",
            field="lora_path",
            remedy="raise --max-adapter-download-bytes",
        )

    def _download(
        self,
        source: object,
        files: RemoteFiles,
        name: str,
        stamp: FileStamp,
        path: Path,
        deadline_s: float,
    ) -> _File:
        """One file onto the disk, never more of it than was announced."""
        hashed, size = hashlib.sha256(), 0
        chunks = files.chunks(name)
        with contextlib.closing(chunks), open(path, "xb") as file:
            for chunk in chunks:
                size += len(chunk)
                if size > stamp.size:
                    raise self._too_large(source, f"sends more of {name} than it announced")
                if self._closed.is_set():
                    raise SourceUnavailable(f"the download of {source} was given up")
                if time.monotonic() > deadline_s:
                    raise SourceUnavailable(
                        f"{source} took longer than {self._timeout_s:g} s",
                        field="lora_path",
                        remedy="try again, or raise --adapter-fetch-timeout-s",
                    )
                hashed.update(chunk)
                file.write(chunk)
        digest = hashed.hexdigest()
        if size != stamp.size or stamp.sha256 not in (None, digest):
            raise SourceUnavailable(
                f"{name} of {source} arrived damaged or incomplete",
                field="lora_path",
                remedy="try again",
            )
        return _File(size, digest)


class _Cache:
    """The folders of the module's docstring."""

    def __init__(self, root: Path):
        self._root = root

    def content(self, digest: str) -> Path:
        return self._root / "content" / digest

    @contextlib.contextmanager
    def partial(self) -> Iterator[Path]:
        """A fresh folder, gone at the end unless it was renamed."""
        parent = self._root / "partial"
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.iterdir():
            with contextlib.suppress(OSError):
                if left.stat().st_mtime < time.time() - STALE_S:
                    shutil.rmtree(left, ignore_errors=True)
        folder = parent / uuid.uuid4().hex
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def keep(self, folder: Path, files: Mapping[str, _File]) -> str:
        """Make a whole download the content of its digest."""
        listed = "".join(f"{n} {f.size} {f.sha256}\n" for n, f in sorted(files.items()))
        digest = hashlib.sha256(listed.encode()).hexdigest()
        target = self.content(digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(3):
            if target.exists():
                if _is_intact(target, files):
                    return digest
                with contextlib.suppress(OSError):  # somebody else may be as quick
                    os.rename(target, folder.parent / uuid.uuid4().hex)
            with contextlib.suppress(OSError):
                os.rename(folder, target)
                return digest
        raise OSError(f"{target} cannot be written")

    def remember(
        self,
        key: str,
        origin: str,
        digest: str,
        stamps: Mapping[str, FileStamp],
        files: Mapping[str, _File],
    ) -> None:
        parent = self._root / "sources"
        parent.mkdir(parents=True, exist_ok=True)
        entry = {
            "origin": origin,
            "digest": digest,
            "files": {
                name: {"size": f.size, "sha256": f.sha256, "version": stamps[name].version}
                for name, f in files.items()
            },
        }
        fresh = parent / f".{uuid.uuid4().hex}"
        fresh.write_text(json.dumps(entry), encoding="utf-8")
        os.replace(fresh, parent / f"{key}.json")

    def find(self, key: str, stamps: Mapping[str, FileStamp] | None) -> Fetched | None:
        """What was kept for this source, if it is whole and, with `stamps`, has not changed there."""
        try:
            entry = json.loads((self._root / "sources" / f"{key}.json").read_text(encoding="utf-8"))
            files = {n: _File(f["size"], f["sha256"]) for n, f in entry["files"].items()}
            known = {n: (f["size"], f["version"]) for n, f in entry["files"].items()}
            origin, digest = str(entry["origin"]), str(entry["digest"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        if stamps is not None:
            told = {name: (stamp.size, stamp.version) for name, stamp in stamps.items()}
            if told != known or any(version is None for _, version in told.values()):
                return None
        folder = self.content(digest)
        return Fetched(folder, origin) if _is_intact(folder, files) else None


def _is_intact(folder: Path, files: Mapping[str, _File]) -> bool:
    try:
        return {path.name for path in folder.iterdir()} == set(files) and all(
            _file_of(folder / name) == file for name, file in files.items()
        )
    except OSError:
        return False


def _file_of(path: Path) -> _File:
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hashed.update(chunk)
        return _File(file.tell(), hashed.hexdigest())
