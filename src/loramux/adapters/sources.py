"""Where an adapter comes from, as an operator or a script writes it; nothing is read here.

    folder, /folder, file:///folder          LocalFolder
    org/name, org/name@revision, hf://...    HubRepository
    s3://bucket/folder, memory://folder      RemoteFolder, on any file system that fsspec knows

A folder that is there goes before a repository of the same spelling. Callers of the server cannot give
such texts: `server/adapter_paths.py` and `resolvers.py` say what they may name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from loramux.errors import InvalidField

MAX_SOURCE_LENGTH = 4096
LOCAL_SCHEMES = ("file", "local")
HUB_SCHEME = "hf"

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder of this machine; it need not be there."""

    path: Path


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A model repository of the Hugging Face Hub; `revision` None is its main branch."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, whose files never change."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A folder on a file system of fsspec. `url` holds no credentials, see `parse_source`."""

    scheme: str
    url: str

    def __str__(self) -> str:
        return self.url


Source = LocalFolder | HubRepository | RemoteFolder


def parse_source(text: str) -> Source:
    """What `text` refers to. Raises InvalidField for what can be none of them."""
    if not text or len(text) > MAX_SOURCE_LENGTH or _CONTROL.search(text):
        raise _refused("it is empty, too long or holds control characters")
    if found := _URL.fullmatch(text):
        return _parse_url(found[1].lower(), found[2], text)
    folder = Path(text).expanduser()
    if text.startswith(("/", ".", "~")) or folder.is_dir():
        return LocalFolder(folder)
    if found := _REPOSITORY.fullmatch(text):
        return _repository(found)
    return LocalFolder(folder)


def _parse_url(scheme: str, rest: str, text: str) -> Source:
    if scheme in LOCAL_SCHEMES:
        if not rest.startswith("/"):
            raise _refused("a URL of a local folder is file:///folder")
        path = unquote(rest) if scheme == "file" else rest
        if _CONTROL.search(path):
            raise _refused("it holds control characters")
        return LocalFolder(Path(path))
    if scheme == HUB_SCHEME:
        found = _REPOSITORY.fullmatch(rest.rstrip("/"))
        if found is None:
            raise _refused("a URL of the Hub is hf://org/name or hf://org/name@revision")
        return _repository(found)
    _check_url(scheme, rest)
    return RemoteFolder(scheme, f"{scheme}://{rest.rstrip('/')}")


def _check_url(scheme: str, rest: str) -> None:
    """Nothing may be secret in what messages and logs show, and nothing may leave the folder."""
    if "::" in rest:
        raise _refused("chained URLs (a::b) are not read")
    try:
        parts = urlsplit(f"x://{rest}")
    except ValueError:
        raise _refused("it is no URL") from None
    if "@" in parts.netloc or parts.query or parts.fragment or "?" in rest or "#" in rest:
        raise InvalidField(
            f"a {scheme}:// URL of an adapter has a user, a password, a query or a fragment",
            field="lora_path",
            remedy="leave it out: credentials belong into the environment or the configuration of the "
            "file system",
        )
    names = unquote(parts.path).split("/")
    if not rest.strip("/") or ".." in names or "." in names:
        raise _refused("it names no folder")


def _repository(found: re.Match[str]) -> HubRepository:
    name, revision = found[1], found[2]
    if "--" in name or ".." in name or ".." in (revision or ""):
        raise _refused("it is no repository of the Hub")
    return HubRepository(name, revision)


def _refused(why: str) -> InvalidField:
    return InvalidField(
        f"lora_path is refused: {why}",
        field="lora_path",
        remedy="name a folder, a repository of the Hub (org/name@revision) or a URL that fsspec reads",
    )
