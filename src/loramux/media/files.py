"""Media in files of the server's machine, inside folders that the operator named."""

from __future__ import annotations

import os
import stat

from loramux.config import MediaConfig
from loramux.errors import BadMedia, Forbidden, MediaUnavailable
from loramux.media.sources import LocalFile


def read_file(source: LocalFile, config: MediaConfig) -> bytes:
    """The bytes of the file, proven to lie inside one of `config.allowed_media_roots`.

    Blocks on the file system. Raises Forbidden for what is outside (existing or not, so that the
    answer tells nothing about it), MediaUnavailable for what is not there or no regular file, BadMedia
    for what is too large.
    """
    inside = _inside(source.path, config.allowed_media_roots)
    if not inside:
        raise _outside(source.path, config)
    for real in inside:
        try:
            data = _read(real, config.max_media_bytes + 1)
        except OSError:
            continue
        if len(data) > config.max_media_bytes:
            raise BadMedia(f"the file is larger than the {config.max_media_bytes} bytes allowed")
        return data
    raise MediaUnavailable(
        f"there is no readable file {_shown(source.path)} in the allowed folders"
    )


def _inside(path: str, roots: list[str]) -> list[str]:
    """The real paths that `path` means under the roots, those that leave them left out."""
    found = []
    for root in map(os.path.realpath, roots):
        try:
            real = os.path.realpath(os.path.join(root, path))
        except (OSError, ValueError):
            continue
        if real != root and os.path.commonpath([real, root]) == root:
            found.append(real)
    return found


def _read(real: str, most: int) -> bytes:
    """Up to `most` bytes of a regular file; OSError for anything else."""
    # Not following: `real` has no links, unless it was swapped since. Not blocking: it may be a FIFO.
    descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(descriptor)


def _outside(path: str, config: MediaConfig) -> Forbidden:
    if not config.allowed_media_roots:
        return Forbidden(
            "media from local files are not allowed on this server",
            remedy="send a data: URL, or have the operator set allowed_media_roots",
        )
    return Forbidden(
        f"{_shown(path)} is not inside a folder that media may come from",
        remedy="put it under one of allowed_media_roots; links may not leave them",
    )


def _shown(path: str) -> str:
    return repr(path if len(path) <= 80 else f"{path[:80]}...")
