"""Between rank 0 and another rank on the same host: messages in order, a file beside one if need be.

The other end is a process of ours, so messages are pickled.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from loramux.adapters.weights import AdapterSource, Vectors
from loramux.config import EngineConfig, ModelFacts
from loramux.engine.plan import AdapterLoad

LENGTH = 8  # bytes before a message that say how long it is
SIGN_S = 0.5


@dataclass(frozen=True, slots=True)
class Start:
    """To a rank, first of all: who it is. `config` has the device of this rank."""

    rank: int
    size: int
    store_path: str
    config: EngineConfig
    shared: bool  # whether ranks share a GPU
    threads: int


@dataclass(frozen=True, slots=True)
class Meet:
    """To a rank that has come up: all have, so join the group."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """To a rank that has loaded the model: what all have agreed on."""

    config: EngineConfig
    facts: ModelFacts


@dataclass(frozen=True, slots=True)
class Load:
    """To a rank: write this adapter, whose bytes are in the file that comes along."""

    number: int
    load: AdapterLoad
    source: AdapterSource
    num_bytes: int
    rehearsal: bool  # write nothing
    affine: Vectors = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stop:
    """To a rank: leave."""


@dataclass(frozen=True, slots=True)
class Here:
    """From a rank: it has started, or it has loaded the model, whose `facts` are these."""

    facts: ModelFacts | None = None


@dataclass(frozen=True, slots=True)
class Alive:
    """From a rank, every `SIGN_S`: its process runs."""

    entered: int  # collectives so far
    writing_s: float  # for so long it has been writing an adapter; 0: it is not


@dataclass(frozen=True, slots=True)
class Loaded:
    """From a rank: how a load ended."""

    number: int
    failure: Exception | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """From a rank: why it is about to leave."""

    error: Exception


def content_of(message: Any) -> bytes:
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


class Link:
    """One end. `send` may be called from any thread, `receive` from one."""

    def __init__(self, end: socket.socket):
        self._socket = end
        self._lock = threading.Lock()

    def send(self, message: Any, file: int | None = None) -> None:
        """Raises OSError when the other end is gone."""
        self.send_content(content_of(message), file)

    def send_content(self, content: bytes, file: int | None = None) -> None:
        """As `send`, of a message that others get as well."""
        head = len(content).to_bytes(LENGTH, "little")
        with self._lock:
            if file is None:
                self._socket.sendall(head + content)
            else:
                socket.send_fds(self._socket, [head], [file])
                self._socket.sendall(content)

    def receive(self) -> tuple[Any, int | None]:
        """The next message, and the file that came with it. Raises EOFError when there is no more."""
        head, files, _, _ = socket.recv_fds(self._socket, LENGTH, 1)
        head += self._exactly(LENGTH - len(head)) if head else b""
        if not head:
            raise EOFError
        content = self._exactly(int.from_bytes(head, "little"))
        return pickle.loads(content), files[0] if files else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes who waits in `receive`
        self._socket.close()

    def _exactly(self, count: int) -> bytes:
        parts = []
        while count:
            part = self._socket.recv(min(count, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


@contextmanager
def in_file(buffer: torch.Tensor) -> Iterator[int]:
    """A file in memory with the bytes of `buffer` [bytes] uint8, by its descriptor."""
    file = os.memfd_create("adapter") if hasattr(os, "memfd_create") else _unnamed()
    try:
        view = buffer.numpy().data
        done = 0
        while done < len(view):
            done += os.pwrite(file, view[done:], done)
        yield file
    finally:
        os.close(file)


def from_file(file: int, num_bytes: int) -> torch.Tensor:
    """The bytes [num_bytes] uint8 of such a file, which is closed; they are not copied."""
    try:
        if not num_bytes:
            return torch.empty(0, dtype=torch.uint8)
        view = mmap.mmap(file, num_bytes, access=mmap.ACCESS_COPY)
        return torch.frombuffer(view, dtype=torch.uint8)  # [num_bytes]
    finally:
        os.close(file)


def _unnamed() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
