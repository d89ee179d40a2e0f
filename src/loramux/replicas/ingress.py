"""The other two deployments: the front that Ray's proxies call, and the catalog."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from loramux.config import ServerConfig
from loramux.errors import EngineStopped, LoramuxError
from loramux.replicas.catalog import Catalog, State
from loramux.replicas.exposition import merge
from loramux.replicas.front import create_front
from loramux.replicas.remote import RemoteAsk, RemoteReplicas
from loramux.types import AdapterRef


@serve.ingress()
class Ingress:
    """`create_front` over the replicas; light, so there is one for each replica."""

    def __init__(
        self, replicas: DeploymentHandle[Any], config: ServerConfig, base_names: Sequence[str]
    ) -> None:
        self._ask = RemoteAsk(replicas)
        self._config = config
        self._base_names = frozenset(base_names)
        self._all = RemoteReplicas(serve.get_replica_context().app_name)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_front(self._ask, self._config, self._base_names, self._metrics)

    async def _metrics(self) -> tuple[bytes, str]:
        results = await self._all.call("exposition")
        pages = dict(result for result in results if not isinstance(result, BaseException))
        if not pages:
            raise EngineStopped("no replica is running")
        return merge(pages), CONTENT_TYPE_LATEST


class CatalogKeeper:
    """`Catalog` as a deployment, of which there is one."""

    def __init__(self, sources: Sequence[tuple[str, str]]) -> None:
        self._catalog = Catalog(sources, RemoteReplicas(serve.get_replica_context().app_name))

    async def state(self, known: int) -> State | None:
        return await self._catalog.state(known)

    async def confirm(self, refs: Sequence[AdapterRef]) -> list[str]:
        return await self._catalog.confirm(refs)

    async def load(
        self, name: str, path: str, replace: bool, expected: str | None, pinned: bool | None
    ) -> AdapterRef | LoramuxError:
        """The version that is served, or why none is: Ray logs what is raised as a fault."""
        try:
            return await self._catalog.load(name, path, replace, expected, pinned)
        except LoramuxError as error:
            return error

    async def unload(self, name: str, expected: str | None) -> AdapterRef | LoramuxError | None:
        try:
            return await self._catalog.unload(name, expected)
        except LoramuxError as error:
            return error

    async def pin(self, name: str, pinned: bool) -> AdapterRef | LoramuxError | None:
        try:
            return await self._catalog.pin(name, pinned)
        except LoramuxError as error:
            return error

    async def fail(self, error: LoramuxError) -> None:
        self._catalog.fail(error)

    async def failure(self) -> list[LoramuxError]:
        """The newest reason for which a replica did not start, if any."""
        error = self._catalog.failure()
        return [error] if error is not None else []
