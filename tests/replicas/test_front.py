"""The front over replicas that answer, refuse, or are lost; and what it forwards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from starlette.types import Message

from loramux.config import ServerConfig
from loramux.errors import LoramuxError, Overloaded, ReplicaLost
from loramux.replicas.forwarding import Forwarded, adapters_of, answer, unless_dead
from loramux.replicas.front import MAX_ATTEMPTS, create_front
from loramux.server.app import create_app
from media_files import data_url, random_png

BASE = "org/base"
PROMPT = {"model": "alpha", "prompt": "hello", "max_tokens": 20}
STREAM = Forwarded(
    "POST",
    "/v1/completions",
    b"",
    [(b"content-type", b"application/json")],
    json.dumps({**PROMPT, "stream": True}).encode(),
    ("alpha",),
)


class Fleet:
    """One app behind the front. `lose` (attempts) end with their replica after `after` batches."""

    def __init__(self, lose: int = 0, after: int = 0, error: LoramuxError | None = None) -> None:
        self.engine = FakeEngine()
        self.engine.delay_s = 0.005
        self.app = create_app(self.engine, ServerConfig(), owns_engine=False)  # type: ignore[arg-type]
        self.lose, self.after, self.error = lose, after, error
        self.asked: list[Forwarded] = []

    async def __call__(self, request: Forwarded) -> AsyncIterator[list[Message]]:
        self.asked.append(request)
        if self.error is not None:
            raise self.error
        batches = 0
        async for batch in answer(self.app, request):
            if len(self.asked) <= self.lose and batches >= self.after:
                raise ReplicaLost("the replica that had this request is lost")
            yield batch
            batches += 1

    async def metrics(self) -> tuple[bytes, str]:
        return b"all of them", "text/plain"

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        settings = kwargs.pop("settings", {})
        front = create_front(self, ServerConfig(**settings), {BASE}, self.metrics)

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app=front, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(send())

    def complete(self, **more: Any) -> httpx.Response:
        return self.request("POST", "/v1/completions", json={**PROMPT, **more})


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/completions", PROMPT),
        ("POST", "/v1/completions", {**PROMPT, "stream": True}),
        ("POST", "/v1/completions", {**PROMPT, "model": "nobody"}),
        ("POST", "/v1/completions", {**PROMPT, "suffix": "x"}),
        ("POST", "/v1/chat/completions", {"model": BASE, "messages": []}),
        ("POST", "/v1/embeddings", {"model": BASE, "input": ["a", "b"], "request_id": "x"}),
        ("POST", "/classify", {"model": "alpha", "input": "a", "request_id": "x"}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "x"}),
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/nobody", None),
        ("GET", "/health", None),
        ("GET", "/nowhere?a=b", None),
        ("DELETE", "/v1/models", None),
    ],
)
def test_the_answer_is_that_of_a_single_server(method: str, path: str, body: Any) -> None:
    fleet = Fleet()
    through = fleet.request(method, path, json=body)

    async def directly() -> httpx.Response:
        transport = httpx.ASGITransport(app=fleet.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, json=body)

    direct = asyncio.run(directly())
    assert through.status_code == direct.status_code
    kinds = [reply.headers.get("content-type") for reply in (through, direct)]
    assert kinds[0] == kinds[1]
    assert _without_ids(through.text) == _without_ids(direct.text)
    for name in ("x-loramux-adapters", "allow", "retry-after"):
        assert through.headers.get(name) == direct.headers.get(name)


def test_media_and_default_adapters_through_the_front() -> None:
    fleet = Fleet()
    fleet.engine = FakeEngine(
        modalities=["image"], context=1000, default_mm_loras={"image": "/adapters/i"}
    )
    fleet.app = create_app(fleet.engine, ServerConfig(), owns_engine=False)  # type: ignore[arg-type]
    part = {"type": "image_url", "image_url": {"url": data_url(random_png(1))}}
    body = {"model": BASE, "messages": [{"role": "user", "content": [part]}]}
    answer = fleet.request("POST", "/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-loramux-adapters"].startswith("~image@")
    assert answer.json()["lora"][0]["modality"] == "image"
    assert fleet.asked[0].members == (), "which replica answers does not depend on it: all have it"
    named = fleet.request("POST", "/v1/chat/completions", json={**body, "model": "~image"})
    assert named.status_code == 404


def _without_ids(text: str) -> list[str]:
    return [part for part in text.split(",") if '"id":"cmpl' not in part and "created" not in part]


@pytest.mark.parametrize("stream", [False, True])
def test_a_lost_request_is_asked_again(stream: bool) -> None:
    fleet = Fleet(lose=MAX_ATTEMPTS - 1)
    reply = fleet.complete(stream=stream)
    assert reply.status_code == 200 and len(fleet.asked) == MAX_ATTEMPTS
    assert "<alpha*1>" in (reply.text if not stream else _text_of(reply))


def _text_of(reply: httpx.Response) -> str:
    frames = [frame.removeprefix("data: ") for frame in reply.text.split("\n\n")]
    events = [json.loads(frame) for frame in frames if frame.startswith("{")]
    return "".join(event["choices"][0]["text"] for event in events)


def test_a_request_that_loses_every_replica_is_given_up() -> None:
    fleet = Fleet(lose=99)
    reply = fleet.complete()
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "engine_stopped"
    assert len(fleet.asked) == MAX_ATTEMPTS


def test_a_stream_that_has_begun_ends_with_an_error_event() -> None:
    fleet = Fleet(lose=1, after=2)
    reply = fleet.complete(stream=True)
    assert reply.status_code == 200 and len(fleet.asked) == 1
    *_, error, done, end = reply.text.split("\n\n")
    assert "engine_stopped" in error and done == "data: [DONE]" and end == ""


def test_a_change_of_adapters_is_not_repeated() -> None:
    fleet = Fleet(lose=1)
    body = {"lora_name": "x", "lora_path": "x"}
    reply = fleet.request("POST", "/v1/load_lora_adapter", json=body)
    assert reply.status_code == 503 and len(fleet.asked) == 1


def test_a_full_fleet_says_so() -> None:
    reply = Fleet(error=Overloaded("too many requests are waiting")).complete()
    assert reply.status_code == 429 and reply.headers["retry-after"] == "1"


def test_key_and_size_are_checked_before_anybody_is_asked() -> None:
    fleet = Fleet()
    settings = {"api_key": "secret", "max_body_bytes": 1024}
    right = {"Authorization": "Bearer secret"}
    assert fleet.request("GET", "/v1/models", settings=settings).status_code == 401
    large = {**PROMPT, "prompt": "x" * 2000}
    path = "/v1/completions"
    reply = fleet.request("POST", path, json=large, headers=right, settings=settings)
    assert reply.status_code == 413 and not fleet.asked
    assert fleet.request("GET", "/health", settings=settings).status_code == 200
    assert fleet.request("GET", "/metrics", settings=settings).text == "all of them"
    assert len(fleet.asked) == 1


def test_a_client_that_leaves_cancels_the_request() -> None:
    async def scenario() -> None:
        fleet = Fleet()
        fleet.engine.delay_s = 0.05
        batches = fleet(STREAM)
        await anext(batches)
        assert fleet.engine.running == 1
        await batches.aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(0.1)
        assert fleet.engine.running == 0 and fleet.engine.cancelled == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("begun", [False, True])
def test_a_dead_engine_says_nothing_in_place_of_an_answer(begun: bool) -> None:
    """So that the front, which sees the process end, can ask another replica."""

    async def scenario() -> list[list[Message]]:
        fleet, seen = Fleet(), []
        async with asyncio.timeout(0.3):
            async for batch in unless_dead(answer(fleet.app, STREAM), lambda: bool(seen) == begun):
                seen.append(batch)
        return seen

    if begun:
        assert len(asyncio.run(scenario())) > 1
    else:
        with pytest.raises(TimeoutError):
            asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "members"),
    [
        ({"model": BASE}, ()),
        ({"model": "alpha"}, ("alpha",)),
        ({"model": BASE, "lora": ["b", {"name": "a", "scale": 0.5}, "b"]}, ("a", "b")),
        ({"model": BASE, "lora": [{"scale": 1}, 3, None, "../up", "x" * 200]}, ()),
        ({"model": BASE, "lora": {"name": "a"}}, ()),
        ({"model": "two+names"}, ()),
        ({"model": ["alpha"]}, ()),
        (["alpha"], ()),
    ],
)
def test_adapters_of_a_body(body: Any, members: tuple[str, ...]) -> None:
    for path in ("/v1/completions", "/v1/embeddings", "/classify", "/v1/classify"):
        assert adapters_of(path, json.dumps(body).encode(), {BASE}) == members
    assert adapters_of("/v1/models", json.dumps(body).encode(), {BASE}) == ()


def test_a_body_that_is_no_json_is_the_replicas_to_refuse() -> None:
    for body in (b"", b"{", b"[" * 200_000, b"\xff"):
        assert adapters_of("/v1/completions", body, {BASE}) == ()
    reply = Fleet().request("POST", "/v1/completions", content=b"{")
    assert reply.status_code == 415
