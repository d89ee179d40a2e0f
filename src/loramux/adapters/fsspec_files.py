"""Adapters on any file system that fsspec knows: S3, GCS, Azure, memory and so on."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import fsspec
from fsspec.registry import known_implementations

from loramux.adapters.remote_files import (
    CHUNK_BYTES,
    OPTIONAL_FILES,
    PICKLE_NAME,
    REQUIRED_FILES,
    FileStamp,
    missing,
    unavailable,
)
from loramux.adapters.sources import RemoteFolder
from loramux.errors import ConfigError, LoramuxError

EXTRAS = {"s3": "loramux[s3]", "s3a": "loramux[s3]"}
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs"}
# Keys of what file systems tell of a file that change with its content: ETags, generations, times.
VERSION_KEYS = {
    *("etag", "generation", "versionid", "md5hash", "contentmd5", "crc32c", "checksum"),
    *("lastmodified", "mtime", "modified", "updated", "created", "timecreated"),
}


def open_file_system(scheme: str) -> Any:
    """fsspec's file system, which remembers no listing. Raises ConfigError where it is not installed."""
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
    except ImportError:
        package = EXTRAS.get(scheme) or PACKAGES.get(scheme)
        hint = known_implementations.get(scheme, {}).get("err", "install its fsspec package")
        raise ConfigError(
            f"adapters from {scheme}:// need a package that is not installed",
            field="lora_path",
            remedy=f"pip install '{package}'" if package else str(hint),
        ) from None
    except ValueError:
        raise ConfigError(
            f"there is no file system for {scheme}:// URLs",
            field="lora_path",
            remedy="fsspec.available_protocols() lists those that are known",
        ) from None


class FsspecFiles:
    """`RemoteFiles` of one folder."""

    def __init__(self, source: RemoteFolder, optional: Sequence[str] = OPTIONAL_FILES):
        """`optional` are files that need not be there."""
        self._source = source
        self._optional = tuple(optional)
        try:
            self._system = open_file_system(source.scheme)
        except LoramuxError:
            raise
        except Exception as error:  # a client that finds no credentials
            raise unavailable(source, error) from None

    may_change = True

    @property
    def origin(self) -> str:
        return self._source.url

    def stamps(self) -> dict[str, FileStamp]:
        found: dict[str, FileStamp] = {}
        for name in (*REQUIRED_FILES, *self._optional):
            info = self._info(name)
            if info is not None:
                found[name] = FileStamp(int(info["size"]), _version_of(info))
            elif name in REQUIRED_FILES:
                raise missing(self._source, name, has_pickle=self._info(PICKLE_NAME) is not None)
        return found

    def chunks(self, name: str) -> Generator[bytes, None, None]:
        try:
            with self._system.open(f"{self._source.url}/{name}", "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except Exception as error:
            raise unavailable(self._source, error) from None

    def _info(self, name: str) -> dict[str, Any] | None:
        """None where there is no such file."""
        try:
            info: dict[str, Any] = self._system.info(f"{self._source.url}/{name}")
        except FileNotFoundError:
            return None
        except Exception as error:
            raise unavailable(self._source, error) from None
        return info if info.get("type") == "file" and info.get("size") is not None else None


def _version_of(info: dict[str, Any]) -> str | None:
    """What of `info` changes with the content; None where the file system says nothing of the kind."""
    told = {
        key: str(value)
        for key, value in info.items()
        if value is not None and key.lower().replace("_", "").replace("-", "") in VERSION_KEYS
    }
    return repr(sorted(told.items())) if told else None
