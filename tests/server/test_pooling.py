"""`/v1/embeddings` and `/classify`: bodies, shapes, the official client, and clients that leave."""

from __future__ import annotations

import base64
import json
import random
import socket
from array import array
from typing import Any

import httpx
import openai
import pytest
from fake_engine import SPECIAL, FakeEngine
from serving import App, LiveServer, wait_until

from loramux.errors import EngineError, InvalidField, Overloaded
from loramux.types import AdapterUse, PoolingParams


def tokens(text: str) -> list[int]:
    return [SPECIAL, *(ord(character) for character in text)]


def values(token_ids: list[int]) -> list[float]:
    """What FakeEngine makes of a prompt, as 32-bit floats are written."""
    return array("f", [token / 3 for token in token_ids]).tolist()


def embed(app: App, **body: Any) -> httpx.Response:
    return app.post("/v1/embeddings", {"model": "org/base", "input": "hey", **body})


def classify(app: App, path: str = "/classify", **body: Any) -> httpx.Response:
    return app.post(path, {"model": "alpha", "input": "hey", **body})


# --- embeddings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("ab", [tokens("ab")]),
        (["ab", "c"], [tokens("ab"), tokens("c")]),
        ([7, 8, 9], [[7, 8, 9]]),
        ([[7, 8], [9]], [[7, 8], [9]]),
    ],
)
def test_every_form_of_input(app: App, given: Any, wanted: list[list[int]]) -> None:
    answer = embed(app, input=given, user="me", request_id="one").json()
    assert (answer["object"], answer["model"], answer["id"]) == ("list", "org/base", "embd-one")
    assert answer["data"] == [
        {"object": "embedding", "index": index, "embedding": values(ids)}
        for index, ids in enumerate(wanted)
    ]
    count = sum(len(ids) for ids in wanted)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == count
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": len(wanted)}


def test_base64_is_of_little_endian_floats(app: App) -> None:
    text = "".join(chr(random.randrange(32, 5000)) for _ in range(9))
    data = embed(app, input=text, encoding_format="base64").json()["data"]
    content = array("f", base64.b64decode(data[0]["embedding"]))
    assert content.tolist() == values(tokens(text))


def test_fields_reach_the_engine(engine: FakeEngine, app: App) -> None:
    embed(app, dimensions=3, normalize=False, add_special_tokens=False)
    lora = ["beta", {"name": "alpha", "scale": 0.5}]
    answer = embed(app, lora=lora)
    assert engine.seen[0] == (
        *(PoolingParams(task="embed", dimensions=3, normalize=False), ()),
        tokens("hey")[1:],
    )
    uses = (AdapterUse("beta"), AdapterUse("alpha", 0.5))
    assert engine.seen[1] == (PoolingParams(), uses, tokens("hey"))
    assert answer.headers["x-loramux-adapters"].startswith("beta@")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"),
    ({"input": [[]]}, "input"),
    ({"input": ["a", 3]}, "input"),
    ({"input": None}, "input"),
    ({"input": [3, True]}, "input"),
    ({"input": [-1]}, "input"),
    ({"input": ["a"] * 2049}, "input"),
    ({"input": "a" * 200}, "input"),  # and the special token: one more than the context
    ({"input": "", "add_special_tokens": False}, "input"),
    ({"input": "\ud800"}, "input"),
    ({"encoding_format": "hex"}, "encoding_format"),
    ({"dimensions": 0}, "dimensions"),
    ({"pooling": "mean"}, "pooling"),
    ({"temperature": 1}, "temperature"),
    ({"model": "alpha", "lora": ["beta"]}, "lora"),
]


@pytest.mark.parametrize(("body", "field"), BAD, ids=[str(body)[:40] for body, _ in BAD])
def test_bad_bodies_name_the_field(app: App, body: dict[str, Any], field: str) -> None:
    answer = app.request(
        "POST",
        "/v1/embeddings",
        content=json.dumps({"model": "org/base", "input": "hey", **body}),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400
    assert str(answer.json()["error"]["param"]).startswith(field)


def test_an_input_may_fill_the_context(app: App) -> None:
    assert embed(app, input=[5] * 200).status_code == 200
    answer = embed(app, input=[5] * 201)
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_unknown_models(app: App) -> None:
    assert embed(app, model="none").status_code == 404
    assert embed(app, lora=["none"]).status_code == 404


# --- classes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
def test_classes(engine: FakeEngine, app: App, path: str) -> None:
    answer = classify(app, path, input=["ab", "zay"]).json()
    assert answer["object"] == "list" and answer["id"].startswith("classify-")
    first, second = answer["data"]
    assert first == {
        "index": 0,
        "label": "is-b",
        "probs": values(tokens("ab")),
        "num_classes": 3,
    }
    assert (second["index"], second["label"], second["num_classes"]) == (1, "is-z", 4)
    assert engine.seen[0][0] == PoolingParams(task="classify")


@pytest.mark.parametrize("name", ["activation", "use_activation"])
def test_logits_instead_of_probabilities(engine: FakeEngine, app: App, name: str) -> None:
    classify(app, **{name: False})
    assert engine.seen[0][0] == PoolingParams(task="classify", use_activation=False)
    assert classify(app, use_activation=True, activation=False).status_code == 400


def test_it_is_behind_the_api_key() -> None:
    app = App(FakeEngine(), api_key="right")
    for path in ("/classify", "/v1/classify", "/v1/embeddings"):
        body = {"model": "alpha", "input": "hey"}
        assert app.post(path, body).status_code == 401
        headers = {"Authorization": "Bearer right"}
        assert app.post(path, body, headers=headers).status_code == 200


# --- faults ----------------------------------------------------------------------------------------


def test_faults_of_the_engine(engine: FakeEngine, app: App) -> None:
    engine.fail_at, engine.fail_with = 0, EngineError("the step failed")
    assert embed(app, input=["a", "b"]).status_code == 500
    engine.refuse_with = InvalidField("adapter 'alpha' has no classification head", field="lora")
    answer = classify(app)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora")
    engine.refuse_with = Overloaded("too many requests are waiting")
    assert classify(app).status_code == 429
    assert engine.running == 0


def test_metrics(app: App) -> None:
    embed(app, input=["a", "bc"])
    classify(app)
    text = app.get("/metrics").text
    assert 'loramux_requests_total{adapter="",finish_reason="stop"} 2.0' in text
    assert 'loramux_requests_total{adapter="alpha",finish_reason="stop"} 1.0' in text
    assert 'loramux_prompt_tokens_total{adapter=""} 5.0' in text
    assert 'loramux_e2e_request_latency_seconds_count{adapter="alpha"} 1.0' in text


def test_a_client_that_leaves_cancels_its_inputs(live: LiveServer) -> None:
    live.engine.delay_s = 30.0
    content = json.dumps({"model": "alpha", "input": ["a", "b", "c"]}).encode()
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", live.port), timeout=5)
    connection.sendall(head.encode() + content)
    wait_until(lambda: live.engine.running == 3)
    connection.close()
    wait_until(lambda: live.engine.running == 0, timeout_s=3)
    assert live.engine.cancelled == 3


# --- the official client ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", [openai.omit, "float", "base64"])
def test_the_official_client(live: LiveServer, form: Any) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(
            model="alpha", input=["ab", "xyz"], encoding_format=form, dimensions=3
        )
        got = [item.embedding for item in answer.data]
        if form == "base64":
            got = [array("f", base64.b64decode(one)).tolist() for one in got]  # type: ignore[arg-type]
        assert got == [values(tokens("ab")), values(tokens("xyz")[:3])]
        assert [item.index for item in answer.data] == [0, 1]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == 7
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="none", input="x")
