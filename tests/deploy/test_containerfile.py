"""The container file, without an engine to build it: its parts are there and agree with the rest."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser
from manifests import build

from loramux.config import ServerConfig

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KNOWN = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "EXPOSE", "STOPSIGNAL"}
KNOWN |= {"ENTRYPOINT", "CMD", "COMMENT"}


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    with (DEPLOY / "Containerfile").open("rb") as file:
        return DockerfileParser(fileobj=file).structure


def _values(lines: list[dict[str, Any]], instruction: str) -> list[str]:
    return [line["value"] for line in lines if line["instruction"] == instruction]


def test_every_instruction_is_known(lines: list[dict[str, Any]]) -> None:
    assert {line["instruction"] for line in lines} <= KNOWN


def test_both_variants_have_a_base_of_a_fixed_version(lines: list[dict[str, Any]]) -> None:
    *bases, last = _values(lines, "FROM")
    assert last == "base-${VARIANT}" and _values(lines, "ARG")[0] == "VARIANT=cuda"
    assert {base.rpartition(" AS base-")[2] for base in bases} == {"cpu", "cuda"}
    for base in bases:
        image, _, tag = base.partition(" ")[0].rpartition(":")
        assert image and re.search(r"\d", tag), base


def test_what_it_copies_is_there_and_is_sent(lines: list[dict[str, Any]]) -> None:
    ignored = (DEPLOY / "Containerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*"
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = {name for value in _values(lines, "COPY") for name in value.split()[:-1]}
    assert copied == sent and all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {project["readme"], *project["license-files"]} <= copied


def test_its_commands_are_shell_and_leave_nothing_behind(lines: list[dict[str, Any]]) -> None:
    for command in _values(lines, "RUN"):
        subprocess.run(["sh", "-n", "-c", command], check=True)
        if "apt-get install" in command:
            assert "--no-install-recommends" in command
            assert command.endswith("rm -rf /var/lib/apt/lists/*")
        if "pip install" in command:
            assert "-c constraints.txt" in command


def test_the_extra_and_the_command_exist(lines: list[dict[str, Any]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extra,) = re.findall(r"extra='\[(\w+)\]'", " ".join(_values(lines, "RUN")))
    assert extra in project["optional-dependencies"]
    assert json.loads(_values(lines, "ENTRYPOINT")[0]) == [*project["scripts"]]
    assert int(_values(lines, "EXPOSE")[0]) == ServerConfig().port


def test_it_runs_as_the_user_of_the_manifests_and_writes_to_their_volume(
    lines: list[dict[str, Any]],
) -> None:
    (deployment,) = (m for m in build(DEPLOY / "kubernetes" / "base") if m["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    own = pod["securityContext"]
    assert _values(lines, "USER") == [f"{own['runAsUser']}:{own['runAsGroup']}"]
    assert own["runAsUser"] > 0
    places = re.findall(r"(\w+)=(/cache\S*)", " ".join(_values(lines, "ENV")))
    assert {"HOME", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR"} <= {name for name, _ in places}
    assert "/cache" in {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
