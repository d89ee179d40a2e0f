"""One replica: an engine and its app, as Ray Serve runs them in a process."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import Message

from loramux.config import EngineConfig, ServerConfig
from loramux.errors import LoramuxError
from loramux.replicas.catalog import State
from loramux.replicas.forwarding import Forwarded, answer, unless_dead
from loramux.replicas.member import MemberEngine
from loramux.replicas.remote import RemoteCatalog
from loramux.replicas.router import SEAT
from loramux.server.app import create_app
from loramux.types import AdapterRef

logger = logging.getLogger(__name__)

POLL_S = 0.1
FLUSH_S = 0.3  # for the last events of streams whose engine has died to get out


class Replica:
    """The deployment. Its constructor loads model and adapters; Ray restarts it when its check fails."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, config: EngineConfig, server_config: ServerConfig, catalog: DeploymentHandle[Any]
    ) -> None:
        remote = RemoteCatalog(catalog)
        try:
            self._engine = await asyncio.to_thread(MemberEngine.create, config)
            await self._engine.start()
            await self._engine.join(remote)
            # The front has checked that there is a key; what it may do is decided here.
            self._app = create_app(self._engine, server_config, owns_engine=False)
        except LoramuxError as error:
            await remote.fail(error)  # the process that deploys shall say it
            raise
        self._app.state.loramux.started_s = self._engine.known.started_s
        self._watch = asyncio.create_task(self._leave_if_engine_dies())

    async def answer(self, request: Forwarded) -> AsyncIterator[list[Message]]:
        """Batches of ASGI messages."""
        if self._engine.failure is None and not all(map(self._engine.serves, request.members)):
            await self._engine.check()  # it may be newer than this replica
        batches = answer(self._app, request)
        try:
            async for batch in unless_dead(batches, lambda: self._engine.failure is not None):
                yield batch
        finally:
            await batches.aclose()  # type: ignore[attr-defined]

    async def exposition(self) -> tuple[str, str]:
        """This replica's number and its metrics."""
        text = await asyncio.to_thread(self._app.state.loramux.metrics.render)
        return _seat(), text.decode()

    async def state(self) -> State:
        return self._engine.known

    async def stage(self, name: str, path: str, replace: bool) -> AdapterRef | LoramuxError:
        """The version that was read, or why not: Ray logs what is raised as a fault."""
        try:
            return await self._engine.stage(name, path, replace)
        except LoramuxError as error:
            return error

    async def may_pin(self, name: str) -> LoramuxError | None:
        try:
            await self._engine.may_pin(name)
        except LoramuxError as error:
            return error
        return None

    async def set_pin(self, name: str, pinned: bool, revision: int) -> None:
        await self._engine.set_pin(name, pinned, revision)

    async def discard(self, name: str) -> None:
        await self._engine.discard(name)

    async def publish(self, name: str, digest: str, revision: int) -> None:
        await self._engine.publish(name, digest, revision)

    async def withdraw(self, name: str, revision: int) -> None:
        await self._engine.withdraw(name, revision)
        self._app.state.loramux.metrics.prune()

    async def check_health(self) -> None:
        """Ray's hook, every few seconds."""
        await self._engine.check()

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Ray's hook, once: what the router may know."""
        return {SEAT: _seat()}

    async def _leave_if_engine_dies(self) -> None:
        """A process without an engine is of no use: its end tells Ray and every caller at once."""
        while self._engine.failure is None:
            await asyncio.sleep(POLL_S)
        logger.error("the engine has died", exc_info=self._engine.failure)
        await asyncio.sleep(FLUSH_S)
        os._exit(1)

    async def __del__(self) -> None:
        """Ray calls this when the requests in flight have ended, or the time for them is over."""
        if hasattr(self, "_watch"):
            self._watch.cancel()
        if hasattr(self, "_engine"):
            await self._engine.stop(0.0)


def _seat() -> str:
    """Ray's rank of this replica: small, and inherited by the replacement of one that is lost."""
    rank = serve.get_replica_context().rank
    return str(getattr(rank, "rank", rank))
