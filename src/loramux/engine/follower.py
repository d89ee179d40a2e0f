"""A rank other than 0: it does what rank 0 says, in the order it was said, until that one is gone.

    link ─▶ reader thread ─▶ orders ─▶ this thread: start, launch      (collectives meet rank 0's)
                        └──▶ loads ──▶ a thread of their own: write ─▶ answer
         ◀─ signs of life, from a thread of their own

A load waits until every plan that came before it has been launched: an older one may read the rows.
The reader reads from the first moment on: a rank that starts may wait for rank 0 on the device, and
without it for ever.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch

from loramux.adapters.weights import AdapterWeights
from loramux.engine.collector import settle
from loramux.engine.devices import make_runner
from loramux.engine.link import (
    SIGN_S,
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
    from_file,
)
from loramux.engine.plan import StepPlan
from loramux.engine.runner import Runner
from loramux.errors import EngineError, EngineStopped, LoramuxError
from loramux.models.loader import load_model
from loramux.parallel import ALONE, Group, join

logger = logging.getLogger(__name__)

EXIT_LOST = 3  # rank 0 went without a word

Order = TypeVar("Order", Meet, Resolved)


def main(descriptor: int) -> None:
    """The whole life of a rank's process."""
    link = Link(socket.socket(fileno=descriptor))
    follow(link, leave=os._exit)
    logging.shutdown()
    # Taking a communicator down in order waits for captured graphs, and can wait for other ranks.
    os._exit(0)


def follow(link: Link, leave: Callable[[int], object]) -> None:
    """Follow until rank 0 says stop. `leave` is called with an exit code when it is gone."""
    try:
        Follower(link, leave).run()
    except Exception as error:
        logger.error("a rank cannot go on", exc_info=error)
        with contextlib.suppress(OSError):
            link.send(Failed(_sendable(error)))
        leave(1)
    finally:
        link.close()


def _sendable(error: Exception) -> Exception:
    return (
        error
        if isinstance(error, LoramuxError)
        else EngineError(f"{type(error).__name__}: {error}")
    )


class Follower:
    """One rank."""

    def __init__(self, link: Link, leave: Callable[[int], object]):
        self._link = link
        self._leave = leave
        self._orders: queue.SimpleQueue[Meet | Resolved | StepPlan | Stop] = queue.SimpleQueue()
        self._received = 0  # plans; counted by the reader
        self._launched = 0
        self._progress = threading.Condition()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="adapter-writer")
        self._group: Group = ALONE
        self._runner: Runner | None = None
        self._writing_since: float | None = None
        self._left = threading.Event()

    def run(self) -> None:
        start, _ = self._link.receive()
        assert isinstance(start, Start)
        threading.Thread(target=self._give_signs, name="rank-signs", daemon=True).start()
        threading.Thread(target=self._read, name="rank-reader", daemon=True).start()
        try:
            self._runner = self._prepare(start)
            self._follow(self._runner)
        finally:
            with self._progress:
                self._left.set()
                self._progress.notify_all()
            self._loader.shutdown(wait=False, cancel_futures=True)

    def _follow(self, runner: Runner) -> None:
        unsettle = settle()
        self._link.send(Here())
        try:
            while isinstance(plan := self._orders.get(), StepPlan):
                runner.launch(plan)
                with self._progress:
                    self._launched += 1
                    self._progress.notify_all()
            self._loader.shutdown(wait=True, cancel_futures=True)
        finally:
            unsettle()

    def _prepare(self, start: Start) -> Runner:
        torch.set_num_threads(start.threads)
        self._link.send(Here())
        self._await(Meet)  # nobody waits for one that never came
        device = torch.device(start.config.device)
        self._group = join(
            *(start.store_path, start.rank, start.size, device),
            shared=start.shared,
            only_nccl=start.config.disable_custom_all_reduce,
        )
        loaded = load_model(start.config, self._group)
        self._link.send(Here(loaded.facts))
        resolved = self._await(Resolved)
        config = resolved.config.model_copy(update={"device": loaded.facts.device})
        facts = replace(resolved.facts, device=loaded.facts.device)
        return make_runner(loaded.attached, config, facts)

    def _await(self, kind: type[Order]) -> Order:
        """The next order, which a start goes on with. Raises EngineStopped when it is to leave."""
        order = self._orders.get()
        if isinstance(order, Stop):
            raise EngineStopped("rank 0 has given up the start")
        assert isinstance(order, kind)
        return order

    def _give_signs(self) -> None:
        with contextlib.suppress(OSError):  # the reader notices as well
            while not self._left.wait(SIGN_S):
                since = self._writing_since
                writing_s = 0.0 if since is None else time.monotonic() - since
                self._link.send(Alive(self._group.entered, writing_s))

    def _read(self) -> None:
        """In a thread of its own: hand on what comes."""
        try:
            while True:
                message, file = self._link.receive()
                if isinstance(message, Load):
                    assert file is not None
                    self._loader.submit(self._load, message, file, self._received)
                elif isinstance(message, Meet | Resolved | Stop):
                    self._orders.put(message)
                    if isinstance(message, Stop):
                        return
                else:
                    self._received += 1
                    self._orders.put(message.plan())
        except (EOFError, OSError):
            self._orders.put(Stop())
            self._leave(EXIT_LOST)

    def _load(self, message: Load, file: int, after: int) -> None:
        failure: Exception | None = None
        try:
            runner = self._runner
            assert runner is not None, "rank 0 loads before the runners are there. This is a bug."
            with self._progress:
                self._progress.wait_for(lambda: self._launched >= after or self._left.is_set())
            if self._left.is_set():
                raise EngineStopped("the rank is leaving")
            self._writing_since = time.monotonic()
            buffer = from_file(file, message.num_bytes)  # [bytes] uint8
            weights = AdapterWeights(message.load.ref, buffer, message.source, message.affine)
            if message.rehearsal:
                runner.rehearse(weights)
            else:
                runner.load(message.load, weights)
        except Exception as error:
            logger.exception("loading adapter %r failed", message.load.ref.name)
            failure = _sendable(error)
        self._writing_since = None
        with contextlib.suppress(OSError):  # the reader notices as well
            self._link.send(Loaded(message.number, failure))
