"""Models, health, metrics, the API key and the size of bodies."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import pytest
from fake_engine import FakeEngine
from serving import App

from loramux.errors import ConfigError


def test_models(engine: FakeEngine, app: App) -> None:
    listed = app.get("/v1/models").json()
    assert listed["object"] == "list"
    base, alpha, _ = listed["data"]
    assert (base["id"], base["parent"], base["max_model_len"]) == ("org/base", None, 200)
    assert alpha["id"] == "alpha" and alpha["parent"] == "org/base"
    assert alpha["root"] == "/adapters/x"
    assert alpha["digest"] == engine.served["alpha"].digest
    assert app.get("/v1/models/alpha").json() == alpha
    assert app.get("/v1/models/org/base").json() == base
    missing = app.get("/v1/models/none")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_health(engine: FakeEngine, app: App) -> None:
    assert app.get("/health").status_code == 200
    app.asgi.state.loramux.draining = True
    assert app.get("/health").status_code == 503
    app.asgi.state.loramux.draining = False
    engine.failure = RuntimeError("boom")
    assert app.get("/health").status_code == 503


def test_version(app: App) -> None:
    assert app.get("/version").json()["version"]


def samples(app: App) -> dict[str, float]:
    lines = app.get("/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_metrics_of_memory(app: App) -> None:
    seen = samples(app)
    assert seen['loramux_memory_planned_bytes{part="weights"}'] == 700
    assert seen['loramux_memory_planned_bytes{part="kv_cache"}'] == 900


def test_metrics_of_requests(app: App) -> None:
    app.complete(max_tokens=4, n=2)
    app.complete(model="alpha", max_tokens=4)
    app.chat(lora=["beta", {"name": "alpha", "scale": 0.5}], stream=True)
    seen = samples(app)
    assert seen['loramux_requests_total{adapter="",finish_reason="length"}'] == 2
    assert seen['loramux_requests_total{adapter="alpha",finish_reason="length"}'] == 1
    assert seen['loramux_requests_total{adapter="alpha+beta",finish_reason="stop"}'] == 1
    assert seen['loramux_prompt_tokens_total{adapter=""}'] == 4
    assert seen['loramux_generation_tokens_total{adapter=""}'] == 8
    assert seen['loramux_time_to_first_token_seconds_count{adapter=""}'] == 2
    assert seen['loramux_inter_token_latency_seconds_count{adapter="alpha"}'] == 3
    assert seen['loramux_e2e_request_latency_seconds_count{adapter="alpha+beta"}'] == 1


def test_metrics_of_the_engine(engine: FakeEngine, app: App) -> None:
    seen = samples(app)
    assert seen["loramux_kv_cache_usage_ratio"] == 0.25
    assert seen["loramux_requests_running"] == 0
    assert seen["loramux_preemptions_total"] == 0
    digest = engine.served["alpha"].digest
    assert seen[f'loramux_adapter_on_device{{adapter="alpha",digest="{digest}"}}'] == 1
    assert seen[f'loramux_adapter_on_host{{adapter="alpha",digest="{digest}"}}'] == 1


def test_an_unloaded_adapter_leaves_no_series(engine: FakeEngine, app: App) -> None:
    app.complete(model="alpha")
    app.complete(lora=["alpha", "beta"])
    app.complete(model="beta")
    asyncio.run(engine.remove_adapter("alpha"))
    text = app.get("/metrics").text
    assert "alpha" not in text
    assert 'adapter="beta"' in text


def test_labels_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux.server.metrics.MAX_LABELS", 3)
    app = App(FakeEngine(adapters=[f"a{i}" for i in range(9)]))
    for i in range(9):
        app.complete(model=f"a{i}", max_tokens=1)
    labels = set(re.findall(r'loramux_requests_total\{adapter="([^"]*)"', app.get("/metrics").text))
    assert labels == {"a0", "a1", "a2", "(other)"}


def test_two_apps_share_no_metrics() -> None:
    first, second = App(FakeEngine()), App(FakeEngine())
    first.complete()
    assert "loramux_requests_total{" not in second.get("/metrics").text


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Basic s3cret", 401),
        ("Bearer", 401),
        ("Bearer s3cret", 200),
        ("bearer s3cret", 200),
    ],
)
def test_api_key(engine: FakeEngine, header: str | None, status: int) -> None:
    app = App(engine, api_key="s3cret")
    headers = {} if header is None else {"Authorization": header}
    response = app.get("/v1/models", headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/completions", "/v1/load_lora_adapter", "/v1/anything"):
        assert app.post(path, {}).status_code == 401
    assert app.get("/health").status_code == 200
    assert app.get("/metrics").status_code == 200


def test_large_bodies_are_refused_with_and_without_their_length(engine: FakeEngine) -> None:
    app = App(engine, max_body_bytes=2000)
    assert app.complete(user="x" * 1000).status_code == 200

    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"model": "org/base", "prompt": "'
        for _ in range(100):
            yield b"x" * 100

    headers = {"content-type": "application/json"}
    for response in (
        app.complete(user="x" * 3000),
        app.request("POST", "/v1/completions", content=chunks(), headers=headers),
        app.request("POST", "/v1/load_lora_adapter", content=chunks(), headers=headers),
    ):
        assert response.status_code == 413
        assert "--max-body-bytes" in response.json()["error"]["message"]
        assert response.json()["error"]["code"] == "body_too_large"
    assert len(engine.seen) == 1


def test_a_missing_root_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match="lora_root"):
        App(FakeEngine(), lora_root="/no/such/folder")
