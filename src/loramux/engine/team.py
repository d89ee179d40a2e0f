"""The other ranks as rank 0 has them: processes that it starts, talks to, and ends.

Nothing but plans and loads goes out, nothing but facts and answers comes in. A rank that is gone ends
them all: what they hold is worth nothing without its part.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from loramux.adapters.weights import AdapterWeights
from loramux.config import EngineConfig, ModelFacts
from loramux.engine.link import (
    Alive,
    Failed,
    Here,
    Link,
    Load,
    Loaded,
    Meet,
    Resolved,
    Start,
    Stop,
    content_of,
    in_file,
)
from loramux.engine.plan import AdapterLoad
from loramux.engine.watch import Watch
from loramux.errors import ConfigError, EngineStopped
from loramux.parallel import ALONE, Group, join

logger = logging.getLogger(__name__)

NOTICE_S = 2.0  # from a broken collective to the news of whose end broke it
TICK_S = 0.25
LEAVE_S = 10.0  # to a rank that was told to stop


class Process(Protocol):
    """A rank, wherever it runs."""

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


def spawn(end: socket.socket, rank: int) -> Process:
    """Start the process of `rank`, which talks through `end`.

    A plain child, not multiprocessing's: that one imports the caller's script again."""
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
        "from loramux.engine.follower import main; main(int(sys.argv[1]))"
    )
    paths = json.dumps([str(Path(path).resolve()) for path in sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", code, str(end.fileno()), paths],
        pass_fds=(end.fileno(),),
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C is for rank 0, which tells the others
    )


@dataclass(slots=True)
class _Loading:
    """A load that the other ranks have been asked for."""

    waiting: set[int]
    failures: list[Exception] = field(default_factory=list)


class Team:
    """Ranks 1 and up. `send` and `load` may be called from any thread."""

    def __init__(self, devices: Sequence[str], config: EngineConfig, threads: int):
        """Start them all, for `devices` by rank. Waits until they have come up, which takes seconds.
        Raises EngineStopped when one does not."""
        self.size = len(devices)
        self.group: Group = ALONE
        self.lost: EngineStopped | ConfigError | None = None
        self.watch = Watch(self.size, config.rank_timeout_s)
        self._on_lost: list[Callable[[EngineStopped | ConfigError], None]] = []
        self._folder = tempfile.mkdtemp(prefix="loramux-")
        self._changed = threading.Condition()
        self._here: dict[int, list[ModelFacts | None]] = {rank: [] for rank in range(1, self.size)}
        self._reasons: dict[int, Exception] = {}
        self._loading: dict[int, _Loading] = {}
        self._numbers = itertools.count()
        self._closing = False
        self._owner = os.getpid()
        self._links: dict[int, Link] = {}
        self._processes: dict[int, Process] = {}
        self._shared = devices[0].startswith("cuda") and len(set(devices)) < self.size
        self._device = torch.device(devices[0])
        atexit.register(self._abandon)
        try:
            self._begin(devices, config, threads)
        except BaseException:  # Ctrl-C too
            self.end()
            raise

    def _begin(self, devices: Sequence[str], config: EngineConfig, threads: int) -> None:
        """Start the processes and meet them."""
        store = str(Path(self._folder) / "store")
        for rank in range(1, self.size):
            ours, theirs = socket.socketpair()
            self._links[rank] = Link(ours)
            with self._changed:  # so that who ends this knows of every process
                if self._closing or self.lost is not None:
                    raise self.lost or EngineStopped("the start was given up")
                self._processes[rank] = spawn(theirs, rank)
            theirs.close()
            own = config.model_copy(update={"device": devices[rank]})
            self._links[rank].send(Start(rank, self.size, store, own, self._shared, threads))
            threading.Thread(target=self._listen, args=(rank,), daemon=True).start()
        threading.Thread(target=self._tick, name="rank-watch", daemon=True).start()
        self._wait_here(1)
        self.send(Meet())
        self.group = join(
            *(store, 0, self.size, self._device),
            shared=self._shared,
            only_nccl=config.disable_custom_all_reduce,
        )

    def facts(self) -> list[ModelFacts]:
        """What the others found when they loaded the model; waits for it."""
        return [facts for here in self._wait_here(2) if (facts := here[1]) is not None]

    def resolve(self, config: EngineConfig, facts: ModelFacts) -> None:
        """Tell them what all have agreed on; each then makes its runner."""
        self.send(Resolved(config, facts))

    def wait_ready(self) -> None:
        """Until their runners are made."""
        self._wait_here(3)
        self.watch.ready()

    def when_lost(self, tell: Callable[[EngineStopped | ConfigError], None]) -> None:
        """Call `tell` with the reason, in some thread, when a rank is lost; at once if one is."""
        with self._changed:
            self._on_lost.append(tell)
            lost = self.lost
        if lost is not None:
            tell(lost)

    def send(self, message: Any, file: int | None = None) -> None:
        """To all. Raises EngineStopped when one is gone."""
        if self.lost is not None:
            raise self.lost
        content = content_of(message)
        try:
            for link in self._links.values():
                link.send_content(content, file)
        except OSError as error:
            raise self.explain(error) from error

    def load(
        self,
        load: AdapterLoad,
        weights: AdapterWeights,
        own: Callable[[], None],
        *,
        rehearsal: bool = False,
    ) -> None:
        """Write an adapter on every rank, or rehearse it; `own` does rank 0's. Returns when all have.

        Raises what one of them failed with: the rows then hold it nowhere."""
        number = next(self._numbers)
        loading = _Loading(set(self._links))
        with self._changed:
            self._loading[number] = loading
        try:
            with in_file(weights.buffer) as file:
                size = weights.buffer.numel()
                message = Load(number, load, weights.source, size, rehearsal, weights.affine)
                self.send(message, file)
            try:
                own()
            finally:  # before anybody may give these rows away, nobody writes to them any more
                with self._changed:
                    self._changed.wait_for(lambda: not loading.waiting or self.lost is not None)
        finally:
            with self._changed:
                del self._loading[number]
        if self.lost is not None:
            raise self.lost
        if loading.failures:
            raise loading.failures[0]

    def explain(self, error: Exception) -> Exception:
        """Why a collective or a message failed: the loss of a rank, if that was it."""
        with self._changed:
            self._changed.wait_for(lambda: self.lost is not None, NOTICE_S)
        return self.lost or error

    def fail(self, error: Exception) -> EngineStopped | ConfigError:
        """A step went wrong on rank 0: nobody knows where the others are, so all end."""
        found = self.explain(error)
        if self.lost is None:
            self._lose(0, f"{type(found).__name__}: {found}")
        assert self.lost is not None
        return self.lost

    def close(self) -> None:
        """Tell them to leave, and see to it."""
        with self._changed:
            self._closing = True
        for rank, link in self._links.items():
            with contextlib.suppress(OSError):
                link.send(Stop())
            if (process := self._processes.get(rank)) is not None:
                try:
                    if self.lost is not None:
                        process.kill()
                    process.wait(LEAVE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            link.close()

    def leave(self) -> None:
        """This rank leaves as well, after the others; what was captured here must be gone."""
        self.group.close()
        # Not before: a communicator on its way out asks the store, and where there is none it tries for
        # as long as it would wait for a rank.
        shutil.rmtree(self._folder, ignore_errors=True)
        atexit.unregister(self._abandon)

    def end(self) -> None:
        """End them and this rank's part at once."""
        with self._changed:
            self._closing = True
        for process in self._processes.values():
            process.kill()
        self.close()
        self.leave()

    def _abandon(self) -> None:
        """The interpreter leaves and nobody has ended this: a start on another thread, interrupted."""
        if os.getpid() != self._owner:
            return  # forked since: they are another's
        with self._changed:
            self._closing = True
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LEAVE_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_here(self, count: int) -> list[list[ModelFacts | None]]:
        """Until every rank has said so many times that it is there."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.lost or all(len(here) >= count for here in self._here.values())
            )
            if self.lost is not None:
                raise self.lost
            return list(self._here.values())

    def _listen(self, rank: int) -> None:
        """In a thread of its own: what this rank says, and that it is gone."""
        try:
            while True:
                message, _ = self._links[rank].receive()
                with self._changed:
                    self._hear(rank, message)
                    self._changed.notify_all()
        except (EOFError, OSError):
            self._lose(rank, "its process has ended")

    def _tick(self) -> None:
        """In a thread of its own, which nothing that a rank does can hold up."""
        before = time.monotonic()
        while not self._closing and self.lost is None:
            time.sleep(TICK_S)
            now = time.monotonic()
            # This process may have slept itself.
            found = self.watch.tick(min(now - before, 2 * TICK_S), self.group.entered)
            before = now
            if found is not None:
                self._lose(*found)

    def _hear(self, rank: int, message: Any) -> None:
        if isinstance(message, Alive):
            self.watch.heard(rank, message.entered, message.writing_s)
        elif isinstance(message, Here):
            self._here[rank].append(message.facts)
        elif isinstance(message, Failed):
            self._reasons[rank] = message.error
        elif isinstance(message, Loaded) and message.number in self._loading:
            loading = self._loading[message.number]
            loading.waiting.discard(rank)
            if message.failure is not None:
                loading.failures.append(message.failure)

    def _lose(self, rank: int, why: str) -> None:
        with self._changed:
            if self._closing or self.lost is not None:
                return
            reason = self._reasons.get(rank)
            if isinstance(reason, ConfigError):
                self.lost = reason
            else:
                self.lost = EngineStopped(
                    f"rank {rank} of {self.size} is lost: {reason or why}",
                    remedy="start again; the log of that rank may say more",
                )
            self._changed.notify_all()
            told = list(self._on_lost)
        logger.error("%s", self.lost)
        for process in self._processes.values():
            process.kill()  # a stopped one too
        for tell in told:
            tell(self.lost)
        # Last, and beside: it waits for a device that may never answer.
        threading.Thread(target=self.group.abort, name="rank-abort", daemon=True).start()
