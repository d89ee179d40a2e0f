"""The files of an adapter that lies elsewhere: which there are, and their bytes, chunk by chunk.

Messages say what went wrong in our words and name the kind of the error: texts of libraries may hold
signed URLs or keys.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from loramux.adapters.peft_config import CONFIG_NAME, MAX_CONFIG_BYTES
from loramux.adapters.tokenizers import MOST_BYTES
from loramux.errors import AdapterNotFound, SourceUnavailable

WEIGHTS_NAME = "adapter_model.safetensors"
REQUIRED_FILES = (CONFIG_NAME, WEIGHTS_NAME)
OPTIONAL_FILES = ("config.json",)  # names of labels
TOKENIZER_FILES = tuple(MOST_BYTES)
PICKLE_NAME = "adapter_model.bin"
CHUNK_BYTES = 1 << 20


def most_bytes(name: str) -> int | None:
    """Of a file beside the weights; None: any number."""
    return None if name == WEIGHTS_NAME else MOST_BYTES.get(name, MAX_CONFIG_BYTES)


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Size in bytes, and what changes with the content: an ETag, a time; None where nothing does."""

    size: int
    version: str | None
    sha256: str | None = None
    """Where the source promises it."""


class RemoteFiles(Protocol):
    """One source, asked once or several times. Raises AdapterNotFound and SourceUnavailable."""

    def stamps(self) -> dict[str, FileStamp]:
        """Of the files that an adapter needs and that are there, by name."""
        ...

    def chunks(self, name: str) -> Generator[bytes, None, None]:
        """The bytes of one of them."""
        ...

    @property
    def may_change(self) -> bool:
        """Whether somebody may replace the files behind `stamps`."""
        ...

    @property
    def origin(self) -> str:
        """The source in writing, as exactly as it is known: a commit for a branch."""
        ...


def missing(source: object, name: str, *, has_pickle: bool) -> AdapterNotFound:
    """A required file that is not there."""
    if name == WEIGHTS_NAME and has_pickle:
        return AdapterNotFound(
            f"{source} has {PICKLE_NAME}, a pickle, and no {WEIGHTS_NAME}",
            field="lora_path",
            remedy="download it, and run: loramux adapter convert SRC DST",
        )
    return AdapterNotFound(
        f"there is no {name} in {source}",
        field="lora_path",
        remedy="check the name and the revision",
    )


def unavailable(source: object, error: Exception) -> SourceUnavailable:
    return SourceUnavailable(
        f"{source} cannot be read now: {type(error).__name__}",
        field="lora_path",
        remedy="check that the host can be reached and that the credentials of this process may read it",
    )
