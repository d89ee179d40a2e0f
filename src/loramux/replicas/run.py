"""`loramux serve --replicas`: start or join Ray, deploy, wait for a signal, drain, leave."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from loramux.config import EngineConfig, ReplicaConfig, ServerConfig
from loramux.errors import ConfigError, EngineError, LoramuxError
from loramux.server.run import AdapterSource, announce, bind

APP_NAME = "loramux"
POLL_S = 1.0
USAGE_VARIABLE = "RAY_USAGE_STATS_ENABLED"
ADDRESS_VARIABLE = "RAY_ADDRESS"
# Messages are small and travel inline; Ray would take 30 % of the memory, and 75 MiB is its least.
OBJECT_STORE_BYTES = 128 << 20


def serve(
    config: EngineConfig,
    server_config: ServerConfig,
    replica_config: ReplicaConfig,
    adapters: Sequence[AdapterSource] = (),
) -> int:
    """Serve replicas until a signal; 0 after a clean end.

    Raises ConfigError without ray, and what a replica raises that cannot start.
    """
    require_ray()
    replica_config.check_engine(config)
    address = replica_config.ray_address or os.environ.get(ADDRESS_VARIABLE)
    # Ray's proxies listen, not this process; whether they can is known now.
    port = server_config.port if address else _free_port(server_config)
    with _ray(address, replica_config), _signals() as stop:
        gpus = _gpus_per_replica(config, replica_config, local=address is None)
        try:
            _deploy(config, server_config, replica_config, adapters, gpus, port)
            announce(server_config, port, adapters[0].name if adapters else config.model_names[0])
            _watch(stop)
        finally:
            _undeploy()
    return 0


def require_ray() -> None:
    """Raise ConfigError if ray or its Serve cannot be imported."""
    missing = [name for name in ("ray", "aiohttp") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"replicas need Ray Serve, and {', '.join(missing)} is not installed",
            field="replicas",
            remedy="pip install 'loramux[ray]'",
        )


def _free_port(config: ServerConfig) -> int:
    with contextlib.closing(bind(config.host, config.port)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def _ray(address: str | None, replica_config: ReplicaConfig) -> Iterator[None]:
    """Ray, joined or started on this machine. No dashboard, and no statistics unless asked for."""
    os.environ.setdefault(USAGE_VARIABLE, "0")
    import ray

    own: dict[str, Any] = {}
    if address is None:
        own = {
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            # Replicas on CPUs may share cores.
            "num_cpus": max(os.cpu_count() or 1, replica_config.most),
        }
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=True, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cannot reach Ray: {error}", field="ray_address", remedy="check --ray-address"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _gpus_per_replica(config: EngineConfig, replica_config: ReplicaConfig, *, local: bool) -> int:
    """How many GPUs Ray sets aside for each replica. Raises ConfigError if this machine lacks them."""
    import ray

    present = int(ray.cluster_resources().get("GPU", 0))
    if config.device == "cpu" or (config.device == "auto" and not present):
        return 0
    each = config.tensor_parallel_size
    if local and present < each * replica_config.most:
        raise ConfigError(
            f"{replica_config.most} replicas of {each} GPU(s) need {each * replica_config.most}, "
            f"and this machine has {present}",
            field="replicas",
            remedy="start fewer, or join a larger cluster with --ray-address",
        )
    return each


def _deploy(
    config: EngineConfig,
    server_config: ServerConfig,
    replica_config: ReplicaConfig,
    adapters: Sequence[AdapterSource],
    gpus: int,
    port: int,
) -> None:
    """Returns when all replicas serve. Raises the error of one that cannot start."""
    from ray import serve as ray_serve

    from loramux.replicas.application import build

    app = build(
        config,
        server_config,
        replica_config,
        [(source.name, source.path) for source in adapters],
        gpus_per_replica=gpus,
    )
    ray_serve.start(http_options={"host": server_config.host, "port": port})
    try:
        # No access log: a line a request.
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        ray_serve.run(app, name=APP_NAME, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        raise _reason(error) from error


def _reason(error: RuntimeError) -> LoramuxError:
    """Why a replica did not start, as it told the catalog; otherwise in Ray's words."""
    from ray import serve as ray_serve

    from loramux.replicas.remote import CATALOG

    try:
        handle = ray_serve.get_deployment_handle(CATALOG, APP_NAME)
        told = handle.failure.remote().result(timeout_s=5)
    except Exception:  # there is no catalog either
        told = []
    for reason in told:
        assert isinstance(reason, LoramuxError)
        return reason
    return EngineError(f"the replicas failed: {error}")


def _undeploy() -> None:
    """Drain: no new requests, and those in flight get `shutdown_timeout_s`."""
    from ray import serve as ray_serve

    with contextlib.suppress(Exception):  # Ray may be what has gone
        ray_serve.delete(APP_NAME)


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second raises KeyboardInterrupt."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(stop: threading.Event) -> None:
    """Wait for the signal. Raises EngineError when the application is gone."""
    from ray import serve as ray_serve

    while not stop.wait(POLL_S):
        try:
            applications = ray_serve.status().applications
        except Exception as error:
            raise EngineError(f"Ray Serve does not answer: {error}") from error
        if APP_NAME not in applications:
            raise EngineError("the application was deleted from Ray Serve")
