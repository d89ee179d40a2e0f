"""Adapters on the Hugging Face Hub: the files of one commit, by the Hub's own client."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from loramux.adapters.remote_files import (
    CHUNK_BYTES,
    OPTIONAL_FILES,
    PICKLE_NAME,
    REQUIRED_FILES,
    FileStamp,
    missing,
    unavailable,
)
from loramux.adapters.sources import HubRepository
from loramux.errors import AdapterNotFound, SourceUnavailable

ANSWER_TIMEOUT_S = 20.0
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask."""
    return bool(constants.HF_HUB_OFFLINE)


class HubFiles:
    """`RemoteFiles` of one repository."""

    def __init__(self, source: HubRepository, optional: Sequence[str] = OPTIONAL_FILES):
        """`optional` are files that need not be there."""
        self._source = source
        self._optional = tuple(optional)
        self._commit: str | None = source.revision if source.is_pinned else None

    may_change = False  # all files are of one commit

    @property
    def origin(self) -> str:
        return f"{self._source.name}@{self._commit or self._source.revision or 'main'}"

    def stamps(self) -> dict[str, FileStamp]:
        """The commit that the revision means now is settled by the first file; the others are its."""
        found: dict[str, FileStamp] = {}
        for name in (*REQUIRED_FILES, *self._optional):
            stamp = self._stamp(name)
            if stamp is not None:
                found[name] = stamp
            elif name in REQUIRED_FILES:
                has_pickle = self._stamp(PICKLE_NAME) is not None
                raise missing(self._source, name, has_pickle=has_pickle)
        return found

    def chunks(self, name: str) -> Generator[bytes, None, None]:
        try:
            # The session drops our token where the Hub redirects to another host.
            with get_session().stream(
                "GET",
                self._url(name),
                headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                follow_redirects=True,
                timeout=ANSWER_TIMEOUT_S,
            ) as response:
                hf_raise_for_status(response)
                yield from response.iter_raw(CHUNK_BYTES)
        except Exception as error:
            raise self._translated(error) from None

    def _url(self, name: str) -> str:
        return hf_hub_url(self._source.name, name, revision=self._commit or self._source.revision)

    def _stamp(self, name: str) -> FileStamp | None:
        """None where the repository has no such file."""
        try:
            found = get_hf_file_metadata(self._url(name), timeout=ANSWER_TIMEOUT_S)
        except EntryNotFoundError:
            return None
        except Exception as error:
            raise self._translated(error) from None
        if found.size is None or found.etag is None or found.commit_hash is None:
            raise SourceUnavailable(f"the Hub says no size, ETag or commit of {name}")
        self._commit = self._commit or found.commit_hash
        sha256 = found.etag if _SHA256.fullmatch(found.etag) else None
        return FileStamp(found.size, found.etag, sha256)

    def _translated(self, error: Exception) -> AdapterNotFound | SourceUnavailable:
        if isinstance(error, GatedRepoError):
            return AdapterNotFound(
                f"{self._source} is gated on the Hub, and this process has no access",
                field="lora_path",
                remedy="ask for access there, and set HF_TOKEN",
            )
        if isinstance(error, RepositoryNotFoundError):
            return AdapterNotFound(
                f"there is no folder {str(self._source)!r}, nor such a repository on the Hub that this "
                "process may read",
                field="lora_path",
                remedy="check the name; private repositories need HF_TOKEN",
            )
        if isinstance(error, RevisionNotFoundError):
            return AdapterNotFound(
                f"{self._source.name} has no revision {self._source.revision!r}", field="lora_path"
            )
        if isinstance(error, OfflineModeIsEnabled):
            return SourceUnavailable(
                f"{self._source} is not in the cache, and HF_HUB_OFFLINE is set", field="lora_path"
            )
        return unavailable(self._source, error)
