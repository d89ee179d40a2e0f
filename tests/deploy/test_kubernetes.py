"""The manifests are valid, and what they say of loramux is true: flags, ports, paths, times."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from fake_engine import FakeEngine
from manifests import Manifest, build, load
from starlette.testclient import TestClient
from yamllint import linter
from yamllint.config import YamlLintConfig

from loramux.cli import main
from loramux.config import EngineConfig, ServerConfig
from loramux.engine.team import LEAVE_S
from loramux.server import run
from loramux.server.app import create_app

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
KINDS = ["base", "tensor-parallel", "cpu"]
VERSION = "1.31"  # the oldest that the manifests are checked for
RULES = """
extends: default
rules:
  document-start: disable
  line-length: {max: 110}
"""

Settings = tuple[EngineConfig, ServerConfig]


@pytest.fixture(params=KINDS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return build(KUBERNETES / request.param)


def of_kind(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def pod_of(manifests: list[Manifest]) -> dict[str, Any]:
    return of_kind(manifests, "Deployment")["spec"]["template"]["spec"]


def settings_of(pod: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What `loramux` makes of the container's arguments, variables filled in as Kubernetes does."""
    (container,) = pod["containers"]
    known = {entry["name"] for entry in container["env"]}

    def value(found: re.Match[str]) -> str:
        assert found[1] in known, f"$({found[1]}) is not among the container's variables"
        return "secret"

    line = [re.sub(r"\$\(([A-Z_]+)\)", value, argument) for argument in container["args"]]
    served: list[Settings] = []

    def serve(engine: EngineConfig, server: ServerConfig, _: object) -> int:
        served.append((engine, server))
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(run, "serve", serve)
        for variable in container["env"]:
            patch.setenv(variable["name"], variable.get("value", "from a secret"))
        assert main(line) == 0, line
    return served[0]


@pytest.mark.parametrize("path", sorted(KUBERNETES.rglob("*.yaml")), ids=lambda p: p.stem)
def test_the_files_are_tidy_yaml(path: Path) -> None:
    problems = linter.run(path.read_text(encoding="utf-8"), YamlLintConfig(RULES))
    assert not [str(problem) for problem in problems]


def test_every_manifest_fits_the_schema_of_its_kind(manifests: list[Manifest]) -> None:
    for version in (VERSION, kubernetes_validate.latest_version()):
        for manifest in manifests:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_a_wrong_manifest_would_be_found(manifests: list[Manifest]) -> None:
    pod_of(manifests)["containers"][0]["readinessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(of_kind(manifests, "Deployment"), VERSION, strict=True)


def test_flags_and_devices_agree(
    manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = pod_of(manifests)
    engine, server = settings_of(pod, monkeypatch)
    limits = pod["containers"][0]["resources"]["limits"]
    gpus = int(limits.get("nvidia.com/gpu", 0))
    assert gpus == (0 if engine.device == "cpu" else engine.tensor_parallel_size)
    variant = pod["containers"][0]["image"].rpartition("-")[2]
    assert variant == ("cuda" if gpus else "cpu")
    assert server.host == "0.0.0.0" and server.api_key is not None
    mounts = {m["mountPath"]: m for m in pod["containers"][0]["volumeMounts"]}
    assert server.lora_root in mounts and mounts[server.lora_root]["readOnly"]
    assert (gpus > 1) == ("/dev/shm" in mounts)


def test_probes_and_scrapes_meet_our_endpoints(
    manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = of_kind(manifests, "Deployment")
    pod = pod_of(manifests)
    (container,) = pod["containers"]
    _, server = settings_of(pod, monkeypatch)
    open_root = server.model_copy(update={"lora_root": None})
    client = TestClient(create_app(FakeEngine(), open_root, owns_engine=False))  # type: ignore[arg-type]
    assert client.get("/v1/models").status_code == 401  # there is a key, which probes do not have
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": server.port}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["port"] == "http" and client.get(asked["path"]).status_code == 200, probe
    notes = deployment["spec"]["template"]["metadata"]["annotations"]
    assert int(notes["prometheus.io/port"]) == server.port
    assert "loramux_" in client.get(notes["prometheus.io/path"]).text
    (monitor,) = load(KUBERNETES / "monitoring" / "pod-monitor.yaml")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in ports and "loramux_" in client.get(endpoint["path"]).text
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    service = of_kind(manifests, "Service")["spec"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        monitor["spec"]["selector"]["matchLabels"],
        service["selector"],
    ):
        assert selector.items() <= labels
    assert [port["targetPort"] for port in service["ports"]] == ["http"]


def test_there_is_time_to_end_every_request(
    manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = pod_of(manifests)
    (container,) = pod["containers"]
    _, server = settings_of(pod, monkeypatch)
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    needed = float(seconds) + server.shutdown_timeout_s + run.FLUSH_S + LEAVE_S
    assert pod["terminationGracePeriodSeconds"] > needed
    # `/health` answers 503 while it drains: that must not end it early.
    alive = container["livenessProbe"]
    assert (
        alive["periodSeconds"] * alive["failureThreshold"] >= pod["terminationGracePeriodSeconds"]
    )


def test_the_container_may_little(manifests: list[Manifest]) -> None:
    pod = pod_of(manifests)
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    own = container["securityContext"]
    assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"]
    assert own["capabilities"]["drop"] == ["ALL"]
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    made = {m["metadata"]["name"] for m in manifests if m["kind"] == "PersistentVolumeClaim"}
    assert claims == made
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
