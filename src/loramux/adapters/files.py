"""Bytes of adapters into memory, by several threads: one core copies far less than a machine can."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

PIECE = 2 << 20  # bytes at least: long beside handing it to a thread
PAGE = 4096
MOST_COPIERS = 8
CORES_A_COPIER = 2  # the others compute


class FileChanged(OSError):
    """The file is not the one that was checked, or it is written to while it is read."""


def read_into(file: int, start: int, view: memoryview) -> None:
    """Fill `view` with the bytes from `start` on of the open file descriptor `file`.

    The lock of the interpreter is free meanwhile. Raises FileChanged where the file ends too early,
    or another OSError."""
    threads = copiers()
    if threads is None or len(view) <= PIECE:
        _read(file, start, view)
        return
    size = piece(len(view), MOST_COPIERS)
    pieces = range(0, len(view), size)
    # All of them end before this returns or raises: what they fill may be used again afterwards.
    reads = [threads.submit(_read, file, start + at, view[at : at + size]) for at in pieces]
    errors = [error for read in reads if (error := read.exception()) is not None]
    if errors:
        raise errors[0]


def piece(size: int, count: int) -> int:
    """Bytes of each of `count` pieces of `size`, fewer where they would be small.

    As few as there are threads: each handing over waits for the interpreter's lock, which the step
    loop holds for milliseconds."""
    return max(PIECE, -(-size // count // PAGE) * PAGE)


def _read(file: int, start: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], start + done)
        if not count:
            raise FileChanged("it ends too early")
        done += count


def cores() -> int:
    """Those that this process may use."""
    here = hasattr(os, "sched_getaffinity")  # not on every system
    return len(os.sched_getaffinity(0)) if here else os.cpu_count() or 1


@cache
def copiers() -> ThreadPoolExecutor | None:
    """The threads, or None where the cores are too few for more than one."""
    count = min(MOST_COPIERS, cores() // CORES_A_COPIER)
    return ThreadPoolExecutor(count, thread_name_prefix="adapter-bytes") if count > 1 else None
