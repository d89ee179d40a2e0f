"""Replicas on a Ray cluster that is there already, deployed with Ray Serve's own tools.

    cd examples
    serve run ray_serve:app model=HuggingFaceTB/SmolLM2-135M-Instruct max_replicas=4 \\
        adapters=pirate=adapters/pirate,sql=adapters/sql

`loramux serve MODEL --replicas 4` does the same in one command, on a Ray of its own or with
`--ray-address auto` on a cluster; this file is for those who deploy with `serve deploy` and a YAML
file of applications, where `args` holds the arguments below. Host and port are Ray Serve's.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from ray.serve import Application

from loramux.config import EngineConfig, LoRAConfig, ReplicaConfig, ServerConfig
from loramux.replicas.application import build


class Arguments(BaseModel):
    """What `key=value` after the name of the app may be."""

    model_config = ConfigDict(extra="forbid")

    model: str
    served_model_name: str | None = None
    device: str = "auto"
    adapters: str = ""
    """name=path,name=path; the same paths on every node."""
    max_loras: int = 8
    max_lora_rank: int = 16
    lora_root: str | None = None
    """If set, adapters below it may be loaded while it runs."""
    api_key: str | None = None
    min_replicas: int = 1
    max_replicas: int = 2
    gpus_per_replica: int = 0


def app(args: dict[str, Any]) -> Application:
    """The application for `serve run ray_serve:app`."""
    given = Arguments(**args)
    config = EngineConfig(
        model=given.model,
        device=given.device,
        served_model_name=[given.served_model_name] if given.served_model_name else None,
        tensor_parallel_size=max(1, given.gpus_per_replica),
        lora=LoRAConfig(max_loras=given.max_loras, max_lora_rank=given.max_lora_rank),
    )
    server_config = ServerConfig(
        api_key=given.api_key,
        lora_root=given.lora_root,
        allow_runtime_lora_updating=given.lora_root is not None,
    )
    replicas = ReplicaConfig(min_replicas=given.min_replicas, max_replicas=given.max_replicas)
    pairs = (item.partition("=") for item in given.adapters.split(",") if item)
    adapters = [(name, path) for name, _, path in pairs]
    return build(config, server_config, replicas, adapters, gpus_per_replica=given.gpus_per_replica)
