"""The three deployments, put together as one application of Ray Serve.

from loramux.replicas.application import build

app = build(EngineConfig(...), ServerConfig(...), ReplicaConfig(replicas=2))   # serve.run(app)
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from loramux.config import EngineConfig, ReplicaConfig, ServerConfig
from loramux.engine.default_adapters import default_sources
from loramux.replicas.ingress import CatalogKeeper, Ingress
from loramux.replicas.remote import CATALOG, REPLICA
from loramux.replicas.replica import Replica
from loramux.replicas.router import AffinityRouter

HEALTH_CHECK_PERIOD_S = 5.0
HEALTH_CHECK_TIMEOUT_S = 30.0
DRAIN_POLL_S = 0.2
# A start that failed is tried once more: a node may have been lost meanwhile.
MAX_STARTS = 2
# What the replicas do beside generating: lists of models, metrics, changes of adapters.
OTHER_REQUESTS = 256


def build(
    config: EngineConfig,
    server_config: ServerConfig,
    replica_config: ReplicaConfig,
    adapters: Sequence[tuple[str, str]] = (),
    *,
    gpus_per_replica: int = 0,
) -> Application:
    """The application, for `serve.run`. `adapters` are (name, path) to start with.

    Each replica gets `gpus_per_replica` GPUs from Ray, and paths must mean the same on every node.
    Raises ConfigError.
    """
    replica_config.check_engine(config)
    config, adapters = _with_full_paths(config, adapters)
    adapters = [*adapters, *default_sources(config.lora)]
    server_config = _with_full_root(server_config).with_keys_read()
    catalog = serve.deployment(CatalogKeeper, name=CATALOG).options(
        num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000
    )
    engine_limit = config.max_queue_len + config.max_num_seqs  # above it the engine says 429 itself
    drain_s = server_config.shutdown_timeout_s
    replicas = serve.deployment(Replica, name=REPLICA).options(
        **_number(config, replica_config),
        max_ongoing_requests=engine_limit + OTHER_REQUESTS,
        max_queued_requests=config.max_queue_len,
        ray_actor_options={
            "num_cpus": _cpus(replica_config, gpus_per_replica),
            "num_gpus": gpus_per_replica,
        },
        request_router_config=RequestRouterConfig(request_router_class=AffinityRouter),
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        graceful_shutdown_timeout_s=max(drain_s, DRAIN_POLL_S),
        max_constructor_retry_count=MAX_STARTS,
    )
    front = serve.deployment(Ingress).options(
        num_replicas=min(replica_config.most, max(2, math.ceil(replica_config.most / 4))),
        max_ongoing_requests=replica_config.most * engine_limit,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        graceful_shutdown_timeout_s=max(drain_s, DRAIN_POLL_S),
    )
    engines = replicas.bind(config, server_config, catalog.bind(list(adapters)))
    # What a model takes is known where it is: the front lets pass what may be for a multimodal one.
    limit = server_config.body_limit(config.media)
    front_config = server_config.model_copy(update={"max_body_bytes": limit})
    application: Application = front.bind(engines, front_config, config.model_names)
    return application


def _number(config: EngineConfig, replica_config: ReplicaConfig) -> dict[str, Any]:
    """How many replicas, as Ray's options."""
    if replica_config.replicas is not None:
        return {"num_replicas": replica_config.replicas}
    target = replica_config.target_ongoing_requests
    given = {
        "upscale_delay_s": replica_config.upscale_delay_s,
        "downscale_delay_s": replica_config.downscale_delay_s,
    }
    # Ray averages queues over a window; one longer than the delay would be the delay.
    window_s = min(
        30.0, max(1.0, 30.0 if given["upscale_delay_s"] is None else given["upscale_delay_s"])
    )
    scaling = AutoscalingConfig(
        min_replicas=replica_config.fewest,
        max_replicas=replica_config.most,
        target_ongoing_requests=target or max(1.0, config.max_num_seqs / 2),
        look_back_period_s=window_s,
        metrics_interval_s=window_s / 3,
        **{name: value for name, value in given.items() if value is not None},
    )
    return {"autoscaling_config": scaling}


def _cpus(replica_config: ReplicaConfig, gpus: int) -> float:
    if replica_config.cpus_per_replica is not None:
        return replica_config.cpus_per_replica
    return 1 if gpus else max(1, math.floor((os.cpu_count() or 1) / replica_config.most))


def _with_full_paths(
    config: EngineConfig, adapters: Sequence[tuple[str, str]]
) -> tuple[EngineConfig, list[tuple[str, str]]]:
    """The same from any working directory, which replicas do not share with this process."""
    paths = {
        name: os.path.abspath(value)
        for name in ("model", "tokenizer", "chat_template")
        if (value := getattr(config, name)) is not None and os.path.exists(value)
    }
    lora = config.lora
    if lora is not None and lora.default_mm_loras:
        full = {name: os.path.abspath(path) for name, path in lora.default_mm_loras.items()}
        lora = lora.model_copy(update={"default_mm_loras": full})
    changed = config.model_copy(
        update={"served_model_name": config.model_names, "lora": lora, **paths}
    )
    return changed, [(name, os.path.abspath(path)) for name, path in adapters]


def _with_full_root(config: ServerConfig) -> ServerConfig:
    if config.lora_root is None:
        return config
    return config.model_copy(update={"lora_root": os.path.abspath(config.lora_root)})
