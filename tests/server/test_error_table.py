"""Every error has its row, and every way to fail answers in OpenAI's shape."""

from __future__ import annotations

import httpx
import pytest
from fake_engine import FakeEngine
from serving import App, events_of

from loramux import errors
from loramux.server.errors import TABLE, response_of, row_of


def all_errors(kind: type[errors.LoramuxError]) -> list[type[errors.LoramuxError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in all_errors(child))]


def check_shape(response: httpx.Response) -> dict[str, str | None]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


def test_each_class_of_the_tree_has_its_own_row() -> None:
    tree = [kind for kind in all_errors(errors.LoramuxError) if kind.__module__ == errors.__name__]
    assert set(tree) == set(TABLE)


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
def test_statuses_tell_whose_fault_it_is(kind: type[errors.LoramuxError]) -> None:
    status = TABLE[kind].status
    if issubclass(kind, errors.RequestError):
        assert 400 <= status < 500
    elif not issubclass(kind, errors.Overloaded):
        assert status >= 500


def test_a_class_without_a_row_takes_its_parents() -> None:
    class Later(errors.PromptTooLong):
        pass

    assert row_of(Later("x")) is TABLE[errors.PromptTooLong]


def test_an_overloaded_engine_says_when_to_come_back(engine: FakeEngine, app: App) -> None:
    engine.refuse_with = errors.Overloaded("the queue is full", retry_after_s=2.2)
    for stream in (False, True):
        response = app.complete(stream=stream)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "3"
        assert check_shape(response)["code"] == "overloaded"


def test_message_field_and_remedy_reach_the_client() -> None:
    error = errors.InvalidField("n is wrong", field="n", remedy="use 1")
    assert response_of(error).status_code == 400
    assert b"n is wrong (use 1)" in response_of(error).body


def test_a_bug_is_500_and_keeps_its_secrets(engine: FakeEngine, app: App) -> None:
    engine.refuse_with = RuntimeError("secret path")
    response = app.complete()
    assert response.status_code == 500
    assert "secret" not in response.text
    assert check_shape(response)["type"] == "server_error"


def test_a_stopped_engine_is_503(engine: FakeEngine, app: App) -> None:
    engine.stopping = True
    response = app.complete()
    assert response.status_code == 503
    assert check_shape(response)["code"] == "engine_stopped"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405)],
)
def test_wrong_routes(app: App, method: str, path: str, status: int) -> None:
    response = app.request(method, path)
    assert response.status_code == status
    assert path in (check_shape(response)["message"] or "")
    if status == 405:
        assert response.headers["allow"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "said"),
    [
        (b"{", "application/json", 400, "not valid JSON"),
        (b'{"a": \xff}', "application/json", 400, "not valid JSON"),
        (b"[" * 100_000, "application/json", 400, "not valid JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "application/json", 400, "not valid JSON"),
        (b"[]", "application/json", 400, "body"),
        (b"", "application/json", 400, "object"),
        (b'{"model": "m"}', "text/plain", 415, "application/json"),
        (b'{"\\ud800": 1, "model": "m", "prompt": ""}', "application/json", 400, "body"),
        (b'{"model": "\\ud800", "prompt": "a"}', "application/json", 400, "model"),
        (b'{"model": "org/base", "prompt": "\\udfff"}', "application/json", 400, "prompt"),
        (b'{"model": "org/base", "prompt": "a", "user": "\\udfff"}', "application/json", 200, ""),
    ],
)
def test_bodies_that_are_no_json_object(
    app: App, content: bytes, kind: str, status: int, said: str
) -> None:
    headers = {"content-type": kind}
    response = app.request("POST", "/v1/completions", content=content, headers=headers)
    assert response.status_code == status, response.text
    assert status == 200 or said in (check_shape(response)["message"] or "")


def test_a_mid_stream_error_is_an_event_and_the_stream_ends(engine: FakeEngine, app: App) -> None:
    engine.fail_at, engine.fail_with = 3, errors.AdapterLoadFailed("the disk is gone")
    for response in (app.complete(stream=True), app.chat(stream=True)):
        assert response.status_code == 200
        last = events_of(response)[-1]
        assert last["error"]["code"] == "adapter_load_failed"
    assert app.complete().status_code == 500
    assert engine.running == 0
