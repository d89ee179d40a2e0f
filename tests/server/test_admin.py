"""Loading and unloading adapters: who may, what, and from where."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from serving import App

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def make_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    make_adapter(root / "good")
    make_adapter(root / "deep" / "er")
    (root / "empty").mkdir()
    outside = make_adapter(tmp_path / "outside")
    (root / "link-out").symlink_to(outside)
    (root / "link-in").symlink_to(root / "good")
    (root / "file-out").mkdir()
    (root / "file-out" / "adapter_model.safetensors").symlink_to(
        outside / "adapter_model.safetensors"
    )
    make_adapter(tmp_path / "root-sibling")
    return root


@pytest.fixture
def admin(engine: FakeEngine, root: Path) -> App:
    return App(engine, allow_runtime_lora_updating=True, lora_root=str(root))


def test_load_use_and_unload(engine: FakeEngine, admin: App, root: Path) -> None:
    response = admin.post(LOAD, {"lora_name": "new", "lora_path": "good"})
    assert response.status_code == 200
    assert response.text == "Success: LoRA adapter 'new' added successfully."
    assert engine.served["new"].source == str(root / "good")
    assert admin.complete(model="new").status_code == 200
    metrics = admin.get("/metrics").text
    assert 'loramux_adapter_load_seconds_count{adapter="new"} 1.0' in metrics
    response = admin.post(UNLOAD, {"lora_name": "new", "lora_int_id": 3})
    assert response.text == "Success: LoRA adapter 'new' removed successfully."
    assert admin.complete(model="new").status_code == 404
    assert 'adapter="new"' not in admin.get("/metrics").text


@pytest.mark.parametrize("path", ["good", "./good", "deep/er", "link-in", "{root}/good"])
def test_paths_inside_the_root(admin: App, root: Path, path: str) -> None:
    body = {"lora_name": "new", "lora_path": path.format(root=root)}
    assert admin.post(LOAD, body).status_code == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("", 400),
        ("good\x00", 400),
        ("good\n", 400),
        ("~/good", 403),
        ("../outside", 403),
        ("good/../../outside", 403),
        ("good/../good", 403),
        ("/etc", 403),
        ("/no/such/folder", 403),
        ("{root}-sibling", 403),
        ("{root}/../outside", 403),
        ("link-out", 403),
        ("file-out", 403),
        ("missing", 404),
        ("good/adapter_model.safetensors", 404),
        ("empty", 400),
        (7, 400),
    ],
)
def test_paths_that_are_refused(
    engine: FakeEngine, admin: App, root: Path, path: Any, status: int
) -> None:
    path = path.format(root=root) if isinstance(path, str) else path
    response = admin.post(LOAD, {"lora_name": "new", "lora_path": path})
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == "lora_path"
    assert "new" not in engine.served


@pytest.mark.parametrize(
    "name",
    (
        *("", ".", "..", "../x", "a/../b", "/a", "a//b", "a/", "a\\b", "a\x00", "a\n", "a b", "é"),
        *(".a", "-a", "a+b", "~a", "a" * 129, "a%2fb", "\ud800"),
    ),
)
def test_names_that_are_refused(admin: App, name: str) -> None:
    content = json.dumps({"lora_name": name, "lora_path": "good"}).encode()
    headers = {"content-type": "application/json"}
    for path, body in ((LOAD, content), (UNLOAD, content.replace(b', "lora_path": "good"', b""))):
        response = admin.request("POST", path, content=body, headers=headers)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == "lora_name"


@pytest.mark.parametrize("name", ["a", "A.b-c_d:1@x", "org/name", "_x", "7"])
def test_names_that_are_allowed(admin: App, name: str) -> None:
    assert admin.post(LOAD, {"lora_name": name, "lora_path": "good"}).status_code == 200
    assert admin.get(f"/v1/models/{name}").json()["id"] == name
    assert admin.post(UNLOAD, {"lora_name": name}).status_code == 200


def test_taken_names(admin: App) -> None:
    for name in ("alpha", "org/base"):
        response = admin.post(LOAD, {"lora_name": name, "lora_path": "good"})
        assert response.status_code == 409
    body = {"lora_name": "alpha", "lora_path": "good", "load_inplace": True}
    assert admin.post(LOAD, body).status_code == 200


def test_unknown_names_and_fields(admin: App) -> None:
    assert admin.post(UNLOAD, {"lora_name": "gone"}).status_code == 404
    response = admin.post(LOAD, {"lora_name": "x", "lora_path": "good", "rank": 1})
    assert response.json()["error"]["param"] == "rank"


def test_every_reason_for_a_rejection_is_told(admin: App) -> None:
    message = admin.post(LOAD, {"lora_name": "x", "lora_path": "empty"}).json()["error"]["message"]
    assert "adapter_model.safetensors is missing" in message and "no weights" in message


def test_of_two_loads_at_once_one_succeeds(engine: FakeEngine, admin: App) -> None:
    engine.load_delay_s = 0.05

    async def both() -> list[httpx.Response]:
        async with admin.client() as client:
            body = {"lora_name": "new", "lora_path": "good"}
            calls = [client.post(LOAD, json=body) for _ in range(2)]
            return list(await asyncio.gather(*calls))

    answers = asyncio.run(both())
    assert sorted(answer.status_code for answer in answers) == [200, 409]
    # The guard is gone afterwards, also after a failure.
    assert admin.post(LOAD, {"lora_name": "late", "lora_path": "empty"}).status_code == 400
    assert admin.post(LOAD, {"lora_name": "late", "lora_path": "good"}).status_code == 200


@pytest.mark.parametrize("path", [LOAD, UNLOAD])
def test_off_unless_allowed(engine: FakeEngine, app: App, root: Path, path: str) -> None:
    body = {"lora_name": "alpha"} | ({"lora_path": "good"} if path == LOAD else {})
    for shut in (app, App(engine, lora_root=str(root))):
        response = shut.post(path, body)
        assert response.status_code == 403
        assert "--allow-runtime-lora-updating" in response.json()["error"]["message"]
    assert "alpha" in engine.served
    bare = App(FakeEngine((), lora=False), allow_runtime_lora_updating=True, lora_root=str(root))
    assert "--enable-lora" in bare.post(path, body).json()["error"]["message"]
