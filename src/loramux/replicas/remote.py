"""Deployments as their callers see them: Ray's handles behind our protocols, its errors as ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
)
from ray.serve.handle import DeploymentHandle
from starlette.types import Message

from loramux.errors import EngineError, EngineStopped, LoramuxError, Overloaded, ReplicaLost
from loramux.replicas.catalog import State
from loramux.replicas.forwarding import Forwarded, key_of_members
from loramux.types import AdapterRef

REPLICA = "Replica"  # names of the deployments
CATALOG = "Catalog"
CALL_TIMEOUT_S = 600.0  # of a change on all replicas, which reads files
# A catalog that has just come up waits so long for Ray to say which replicas run.
FIRST_CALL_TIMEOUT_S = 10.0


def own(error: BaseException) -> LoramuxError:
    """What went wrong, in our words."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, LoramuxError):
        return error.cause
    if isinstance(error, LoramuxError):
        return error
    if isinstance(error, RayActorError):
        return ReplicaLost("the replica that had this request is lost", remedy="send it again")
    if isinstance(error, BackPressureError):
        return Overloaded("too many requests are waiting")
    if isinstance(error, DeploymentUnavailableError):
        return EngineStopped("no replica is running", remedy="the log of Ray Serve says why")
    return EngineError(f"Ray failed on this request: {type(error).__name__}")


class RemoteReplicas:
    """All replicas, for the catalog and for `/metrics`."""

    def __init__(self, app_name: str) -> None:
        self._app_name = app_name
        self._handle: DeploymentHandle[Any] | None = None

    async def call(self, method: str, *arguments: Any) -> list[Any]:
        timeout_s = CALL_TIMEOUT_S if self._handle is not None else FIRST_CALL_TIMEOUT_S
        if self._handle is None:
            self._handle = serve.get_deployment_handle(REPLICA, self._app_name)
        try:
            results = await self._handle.broadcast(method, *arguments).results_async(
                timeout_s=timeout_s, return_exceptions=True
            )
        except (DeploymentUnavailableError, TimeoutError):
            return []
        told = [own(r) if isinstance(r, BaseException) else r for r in results]
        return [result for result in told if not isinstance(result, ReplicaLost)]


class RemoteCatalog:
    """The catalog, for a replica."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def state(self, known: int = -1) -> State | None:
        return await self._call("state", known)  # type: ignore[no-any-return]

    async def confirm(self, refs: Sequence[AdapterRef]) -> list[str]:
        return await self._call("confirm", list(refs))  # type: ignore[no-any-return]

    async def load(
        self,
        name: str,
        path: str,
        replace: bool,
        expected: str | None = None,
        pinned: bool | None = None,
    ) -> AdapterRef:
        loaded = await self._call("load", name, path, replace, expected, pinned)
        return loaded  # type: ignore[no-any-return]

    async def unload(self, name: str, expected: str | None = None) -> AdapterRef | None:
        return await self._call("unload", name, expected)  # type: ignore[no-any-return]

    async def pin(self, name: str, pinned: bool) -> AdapterRef | None:
        return await self._call("pin", name, pinned)  # type: ignore[no-any-return]

    async def fail(self, error: LoramuxError) -> None:
        await self._call("fail", error)

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            result = await self._handle.options(method_name=method).remote(*arguments)
        except (RayError, RayServeException) as error:
            told = own(error)
            if isinstance(told, ReplicaLost):
                told = EngineStopped("the catalog of adapters was lost", remedy="try again")
            raise told from error
        if isinstance(result, LoramuxError):
            raise result
        return result


class RemoteAsk:
    """Any replica, for the front: Ray chooses with AffinityRouter."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._answer = handle.options(method_name="answer", stream=True)

    async def __call__(self, request: Forwarded) -> AsyncIterator[list[Message]]:
        key = key_of_members(request.members)
        response = self._answer.options(multiplexed_model_id=key).remote(request)
        finished = False
        try:
            async for batch in response:
                yield batch
            finished = True
        except (RayError, RayServeException) as error:
            finished = True
            raise own(error) from error
        finally:
            if not finished:  # the client has gone
                response.cancel()
                await asyncio.sleep(0)
