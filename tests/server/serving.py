"""Two ways to reach the app: in this process through ASGI, and over a real socket."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import uvicorn
from fake_engine import FakeEngine

from loramux.config import ServerConfig
from loramux.server.app import create_app


class App:
    """An app around a FakeEngine, called without a socket."""

    def __init__(self, engine: FakeEngine, **settings: Any) -> None:
        self.engine = engine
        self.asgi = create_app(engine, ServerConfig(**settings), owns_engine=False)  # type: ignore[arg-type]

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.asgi, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=10)

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(send())

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.request("GET", path, **kwargs)

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **kwargs)

    def complete(self, **body: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": "org/base", "prompt": "hey", **body})

    def chat(self, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "hey"}]
        return self.post(
            "/v1/chat/completions", {"model": "org/base", "messages": messages, **body}
        )


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a stream, after checking its framing and its end mark."""
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


class LiveServer:
    """A real uvicorn on a free loopback port, in a thread."""

    def __init__(self, engine: FakeEngine, **settings: Any) -> None:
        self.engine = engine
        self.app = create_app(engine, ServerConfig(**settings))  # type: ignore[arg-type]
        self.server = uvicorn.Server(
            uvicorn.Config(
                self.app, host="127.0.0.1", port=0, log_level="warning", access_log=False
            )
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> LiveServer:
        self.thread.start()
        wait_until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=10)
        assert not self.thread.is_alive()


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
