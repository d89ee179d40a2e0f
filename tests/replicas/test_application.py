"""What Ray Serve is asked for, from the settings; no Ray runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray_serve
from pydantic import ValidationError

from loramux.cli import main
from loramux.config import EngineConfig, LoRAConfig, MediaConfig, ReplicaConfig, ServerConfig
from loramux.errors import ConfigError
from loramux.replicas import application
from loramux.replicas.router import AffinityRouter


def deployments(app: Any) -> dict[str, Any]:
    """Name -> deployment, the arguments of each included."""
    found = {app._bound_deployment.name: app._bound_deployment}
    for argument in app._bound_deployment.init_args:
        if hasattr(argument, "_bound_deployment"):
            found |= deployments(argument)
    return found


def build(replicas: ReplicaConfig, gpus: int = 0, **engine: Any) -> dict[str, Any]:
    config = EngineConfig(model="org/base", lora=LoRAConfig(), **engine)
    return deployments(application.build(config, ServerConfig(), replicas, gpus_per_replica=gpus))


def test_a_fixed_number() -> None:
    found = build(ReplicaConfig(replicas=6), gpus=2)
    assert set(found) == {"Ingress", "Replica", "Catalog"}
    assert found["Replica"].num_replicas == 6 and found["Catalog"].num_replicas == 1
    assert found["Replica"].ray_actor_options["num_gpus"] == 2
    assert found["Replica"].ray_actor_options["num_cpus"] == 1
    router = found["Replica"]._deployment_config.request_router_config
    assert router.get_request_router_class().__name__ == AffinityRouter.__name__


def test_a_range_follows_the_queues() -> None:
    given = ReplicaConfig(min_replicas=2, max_replicas=5, downscale_delay_s=7, cpus_per_replica=3)
    replica = build(given, max_num_seqs=64)["Replica"]
    scaling = replica._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.target_ongoing_requests == 32 and scaling.downscale_delay_s == 7
    assert replica.ray_actor_options["num_cpus"] == 3


def test_draining_gets_the_time_of_a_shutdown_and_the_engine_refuses_first() -> None:
    replica = build(ReplicaConfig(replicas=1), max_queue_len=10, max_num_seqs=4)["Replica"]
    assert replica._deployment_config.graceful_shutdown_timeout_s == 30
    assert replica._deployment_config.max_ongoing_requests > 14


def test_paths_are_the_same_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    app = application.build(
        EngineConfig(model="model", lora=LoRAConfig()),
        ServerConfig(lora_root=".", allow_runtime_lora_updating=True),
        ReplicaConfig(replicas=1),
        [("a", "adapters/a")],
    )
    config, server_config, _ = deployments(app)["Replica"].init_args
    assert config.model == str(tmp_path / "model") and config.model_names == ["model"]
    assert server_config.lora_root == str(tmp_path)
    assert deployments(app)["Catalog"].init_args == ([("a", str(tmp_path / "adapters/a"))],)


def test_default_adapters_are_read_by_every_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lora = LoRAConfig(max_loras=2, default_mm_loras={"image": "i", "audio": "sub/a"})
    app = application.build(
        EngineConfig(model="org/base", lora=lora),
        ServerConfig(),
        ReplicaConfig(replicas=1),
        [("mine", "m")],
    )
    found = deployments(app)
    defaults = {"image": str(tmp_path / "i"), "audio": str(tmp_path / "sub/a")}
    assert found["Replica"].init_args[0].lora.default_mm_loras == defaults
    [sources] = found["Catalog"].init_args
    assert dict(sources) == {
        "mine": str(tmp_path / "m"),
        "~image": defaults["image"],
        "~audio": defaults["audio"],
    }


def test_the_front_lets_pass_what_a_multimodal_replica_would() -> None:
    media = MediaConfig(max_media_bytes=3 << 20)
    found = build(ReplicaConfig(replicas=1), media=media)
    assert found["Ingress"].init_args[1].max_body_bytes == 20 << 20
    assert found["Replica"].init_args[1].max_body_bytes is None, "which knows its model"


def test_the_example_builds_an_application() -> None:
    found = deployments(ray_serve.app({"model": "org/base", "max_replicas": "3"}))
    assert found["Replica"]._deployment_config.autoscaling_config.max_replicas == 3


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"replicas": 2, "max_replicas": 3}, "give replicas, or"),
        ({"min_replicas": 2}, "needs max_replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "is more than"),
        ({"replicas": 2, "upscale_delay_s": 1}, "only max_replicas"),
        ({"ray_address": "auto"}, "needs replicas"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        ReplicaConfig(**settings)


def test_one_named_gpu_is_not_for_replicas() -> None:
    with pytest.raises(ConfigError, match="cuda:1"):
        build(ReplicaConfig(replicas=1), device="cuda:1")


def test_without_ray_the_flag_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", "org/base", "--replicas", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "ray" in line and "pip install 'loramux[ray]'" in line
