"""The one thread in which an engine lives.

OpenMP keeps a team of workers for every thread that ever computed in parallel, and once there are
more workers than cores it puts them to sleep after each small region: a decode step becomes twice as
slow. So the model is loaded where it will run, and no other thread computes in parallel.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Value = TypeVar("Value")


class LoopThread:
    """Runs what it is given, one after the other. A daemon: it never keeps a process alive."""

    def __init__(self, name: str):
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Value], *arguments: Any) -> Future[Value]:
        """Run `function(*arguments)` in the thread; its value or exception is the Future's."""
        future: Future[Value] = Future()

        def job() -> None:
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

        self._jobs.put(job)
        return future

    def close(self) -> None:
        """End the thread after what was submitted before, and wait for it."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
