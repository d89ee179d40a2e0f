"""Who may what: keys, the adapters they may use, and who may change them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, reference
from serving import App, events_of

from loramux.config import ServerConfig
from loramux.config.keys import ApiKey, read_keys
from loramux.errors import ConfigError
from loramux.server.access import Keyring
from loramux.status import AdapterEvent

ALPHA, TEAM, OPS, ALL = (
    "key-of-alpha-only-1",
    "key-of-the-team-222",
    "key-of-the-ops-3333",
    "single",
)
ENTRY = '{"name": "one", "key": "secret-secret-secret"}'
CHANGES = (
    ("POST", "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "good"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "alpha"}),
    ("POST", "/v1/pin_lora_adapter", {"lora_name": "alpha"}),
    ("POST", "/v1/unpin_lora_adapter", {"lora_name": "alpha"}),
    ("PUT", "/v1/adapters/new", {}),
)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(("alpha", "beta", "team/one", "team/two"))


@pytest.fixture
def app(engine: FakeEngine, tmp_path: Path) -> App:
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "adapter_model.safetensors").write_bytes(b"weights")
    keys = [
        {"name": "alpha only", "key": ALPHA, "adapters": ["alpha"]},
        {
            "name": "team",
            "sha256": hashlib.sha256(TEAM.encode()).hexdigest(),
            "adapters": ["team/*"],
        },
        {"name": "ops", "key": OPS, "admin": True},
    ]
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(keys))
    return App(
        engine,
        api_key=ALL,
        api_keys_file=str(file),
        allow_runtime_lora_updating=True,
        allow_adapter_push=True,
        lora_root=str(tmp_path),
    )


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic single", "single", "Bearer singl", "Bearer single2"]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/models"), ("GET", "/v1/adapters"), ("POST", "/v1/completions"), ("POST", "/classify"),
     *((method, path) for method, path, _ in CHANGES)],
)  # fmt: skip
def test_without_a_key_nothing_of_a_model_is_served(
    app: App, method: str, path: str, header: str
) -> None:
    response = app.request(method, path, headers={"authorization": header} if header else {})
    assert response.status_code == 401
    assert error_of(response)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/metrics", "/version"])
def test_the_operators_tools_need_no_key(app: App, path: str) -> None:
    assert app.get(path).status_code == 200


@pytest.mark.parametrize(
    ("key", "may"),
    [
        (ALPHA, {"alpha"}),
        (TEAM, {"team/one", "team/two"}),
        (OPS, set()),
        (ALL, {"alpha", "beta", "team/one", "team/two"}),
    ],
)
def test_each_key_uses_its_adapters_and_the_base(app: App, key: str, may: set[str]) -> None:
    headers = bearer(key)
    body: dict[str, Any] = {"model": "org/base", "prompt": "hey"}
    assert app.post("/v1/completions", body, headers=headers).status_code == 200
    for name in ("alpha", "beta", "team/one", "team/two", "unknown", "team"):
        ways: list[tuple[str, dict[str, Any]]] = [
            ("/v1/completions", {"model": name, "prompt": "hey"}),
            ("/v1/completions", {**body, "lora": [name]}),
            (
                "/v1/chat/completions",
                {"model": name, "messages": [{"role": "user", "content": "a"}]},
            ),
            ("/v1/embeddings", {"model": name, "input": "hey"}),
            ("/classify", {"model": "org/base", "input": "hey", "lora": [{"name": name}]}),
        ]
        for path, content in ways:
            response = app.post(path, content, headers=headers)
            if name in may:
                assert response.status_code == 200, response.text
            elif key == ALL:
                assert response.status_code == 404
            else:
                assert response.status_code == 403, "whether there is such an adapter is not told"
                assert error_of(response)["code"] == "forbidden"
    listed = {card["id"] for card in app.get("/v1/models", headers=headers).json()["data"]}
    assert listed == may | {"org/base"}
    seen = {"alpha", "beta", "team/one", "team/two"} if key == OPS else may
    shown = {row["name"] for row in app.get("/v1/adapters", headers=headers).json()["data"]}
    assert shown == seen
    for name in ("alpha", "beta"):
        for path, found in (("/v1/models/", may), ("/v1/adapters/", seen)):
            status = app.get(path + name, headers=headers).status_code
            assert status == (200 if name in found else 404)


def test_of_a_sum_every_adapter_must_be_allowed(app: App, engine: FakeEngine) -> None:
    body = {"model": "org/base", "prompt": "hey", "lora": ["alpha", {"name": "beta", "scale": 0.1}]}
    response = app.post("/v1/completions", body, headers=bearer(ALPHA))
    assert response.status_code == 403 and "'beta'" in error_of(response)["message"]
    assert engine.seen == []


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
def test_only_admins_change_adapters(
    engine: FakeEngine, app: App, method: str, path: str, body: dict[str, Any]
) -> None:
    served, pinned = dict(engine.served), engine.pinned
    for key in (ALPHA, TEAM):
        response = app.request(method, path, json=body, headers=bearer(key))
        assert response.status_code == 403
        assert "may not change adapters" in error_of(response)["message"]
        assert (engine.served, engine.pinned) == (served, pinned)
    extra = {"x-loramux-adapter-config": "e30="}
    for key in (OPS, ALL):
        engine.served = dict(served)
        response = app.request(method, path, json=body, headers={**bearer(key), **extra})
        assert response.status_code == 200, response.text


def test_where_adapters_come_from_is_for_admins(app: App) -> None:
    rows = {
        key: app.get("/v1/adapters/alpha", headers=bearer(key)).json() for key in (ALPHA, OPS, ALL)
    }
    assert "source" not in rows[ALPHA] and rows[OPS] == rows[ALL]
    assert rows[OPS]["source"] == "/adapters/x"


def test_events_of_others_are_not_told(app: App, engine: FakeEngine) -> None:
    names = ("alpha", "team/one", "beta")
    engine.events = [[AdapterEvent(i, "evicted", name, "d", 1.0) for i, name in enumerate(names)]]

    def told(key: str) -> list[str]:
        text = app.get("/v1/adapters/events", headers=bearer(key)).text
        events = [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n") if part]
        assert events[0]["event"] == "snapshot"
        return [event["name"] for event in events[1:]]

    assert told(TEAM) == ["team/one"] and told(OPS) == told(ALL) == list(names)


def test_streams_are_for_the_key_too(app: App) -> None:
    body = {"model": "alpha", "prompt": "hey", "stream": True}
    assert events_of(app.post("/v1/completions", body, headers=bearer(ALPHA)))
    assert app.post("/v1/completions", body, headers=bearer(TEAM)).status_code == 403


def test_keys_are_never_shown(
    app: App, tmp_path: Path, caplog: pytest.LogCaptureFixture, engine: FakeEngine
) -> None:
    caplog.set_level(logging.DEBUG)
    texts = []
    for key in (ALPHA, TEAM, OPS, ALL, "wrong-key-wrong-key"):
        engine.refuse_with = RuntimeError("a bug")
        body = {"model": "alpha", "prompt": "x"}
        texts.append(app.post("/v1/completions", body, headers=bearer(key)).text)
    config = app.asgi.state.loramux.config
    texts += [caplog.text, repr(config), str(config.all_keys()), repr(Keyring.of(config))]
    for key in (ALPHA, TEAM, OPS, "wrong-key-wrong-key"):
        assert all(key not in text for text in texts)
        assert all(hashlib.sha256(key.encode()).hexdigest() not in text for text in texts)


def test_a_key_may_hold_any_characters() -> None:
    key = "schlüssel-für-alles-€"
    ring = Keyring(None, [ApiKey.model_validate({"name": "x", "key": key})])
    assert ring.find(key.encode()) is not None
    assert ring.find(key.encode()[:-1]) is None and not Keyring(None)
    rng = random.Random()
    for _ in range(100):
        assert ring.find(rng.randbytes(rng.randint(0, 40))) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no JSON"),
        ("{}", "no list of keys"),
        ("[]", "no list of keys"),
        ('["secret-secret-secret"]', "entry 0"),
        ('[{"name": "a"}]', "sha256: Field required"),
        ('[{"name": "a", "key": "secret-short"}]', "at least 16"),
        ('[{"name": "a", "key": ["secret-secret-secret"]}]', "at least 16"),
        ('[{"name": "a", "sha256": "secret-secret-secret"}]', "sha256"),
        ('[{"name": "a", "key": "secret-secret-secret", "rights": 1}]', "rights"),
        ('[{"name": "a", "key": "secret-secret-secret", "adapters": [""]}]', "empty"),
        ('[{"name": "a", "key": "secret-secret-secret", "sha256": "%s"}]' % ("0" * 64), "one of them"),
        (f"[{ENTRY}, {ENTRY.replace('secret', 'other')}]", "two keys"),
        (f"[{ENTRY}, {ENTRY.replace('one', 'two')}]", "one key"),
    ],
)  # fmt: skip
def test_files_of_keys_that_are_refused(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=said) as refused:
        read_keys(str(file))
    assert "secret" not in str(refused.value), "what may be a key is not shown"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(str(tmp_path / "missing"))


def test_the_file_may_be_read_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps([{"name": "a", "key": ALPHA, "adapters": ["alpha"]}]))
    here = ServerConfig(api_keys_file=str(file)).with_keys_read()
    file.unlink()
    assert here.api_keys_file is None
    access = Keyring.of(here).find(ALPHA.encode())
    assert access is not None and access.may_use("alpha") and not access.is_admin


def test_a_pushed_body_is_not_read_for_who_may_not_push(app: App, engine: FakeEngine) -> None:
    """Nor is one that is too large, or has no configuration: the first byte is never asked for."""

    async def put(headers: dict[str, str]) -> tuple[int, bool]:
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            asked = True
            return {"type": "http.request", "body": b"x" * 100, "more_body": False}

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "PUT",
            "scheme": "http", "path": "/v1/adapters/new", "raw_path": b"/v1/adapters/new",
            "root_path": "", "query_string": b"", "client": None, "server": None,
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        }  # fmt: skip
        await app.asgi(scope, receive, send)
        return sent[0]["status"], asked

    config = {"x-loramux-adapter-config": "e30="}
    for headers, status in [
        (config, 401),
        ({**config, **bearer(TEAM)}, 403),
        ({**bearer(OPS)}, 400),
        ({**bearer(OPS), "x-loramux-adapter-config": "no base64"}, 400),
        ({**bearer(OPS), **config, "content-length": str(3 << 30)}, 413),
    ]:
        assert asyncio.run(put(headers)) == (status, False)
    assert asyncio.run(put({**bearer(OPS), **config})) == (200, True)
    assert engine.received == (b"{}", b"x" * 100)
    digest = reference("new", hashlib.sha256(b"x" * 100).hexdigest()).digest
    assert engine.served["new"].digest == digest
