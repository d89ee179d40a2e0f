"""The life of an adapter over HTTP, with a real engine: versions, pushes, drains, pins and events."""

from __future__ import annotations

import base64
import json
import queue
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import LiveServer, wait_until

from loramux.config import EngineConfig, LoRAConfig
from loramux.engine.service import AsyncEngine
from tiny import TinyWorld

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PIN, UNPIN = "/v1/pin_lora_adapter", "/v1/unpin_lora_adapter"
GREEDY = {"prompt": "hello", "temperature": 0, "max_tokens": 6, "ignore_eos": True}
LONG = {**GREEDY, "max_tokens": 240, "n": 24}
MAX_BYTES = 1 << 20


class Life(LiveServer):
    """A server around a real engine. `root` has the adapters a, b, c, d."""

    def __init__(self, world: TinyWorld, root: Path, **lora: Any) -> None:
        for name, folder in world.adapters.items():
            shutil.copytree(folder, root / name)
        self.root = root
        config = EngineConfig(
            model=str(world.model),
            device="cpu",
            served_model_name=["base"],
            kv_cache_memory_bytes=8 << 20,
            adapter_patience_s=0.05,
            lora=LoRAConfig(**{"max_loras": 2, "max_lora_rank": 8, "max_cpu_loras": 3, **lora}),
        )
        self.real = AsyncEngine.create(config)
        super().__init__(
            self.real,  # type: ignore[arg-type]
            allow_runtime_lora_updating=True,
            allow_adapter_push=True,
            lora_root=str(root),
            shutdown_timeout_s=0,
        )

    def __enter__(self) -> Life:
        super().__enter__()
        self.client = httpx.Client(base_url=self.url, timeout=60)
        return self

    def __exit__(self, *arguments: object) -> None:
        self.client.close()
        self.app.state.loramux.draining = True  # as server/run.py does before it stops to listen
        super().__exit__(*arguments)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def load(self, name: str, folder: str, **more: Any) -> httpx.Response:
        return self.post(LOAD, lora_name=name, lora_path=folder, **more)

    def push(self, name: str, folder: str, config: bytes | None = None, **query: Any) -> Any:
        files = self.root / folder
        config = (files / "adapter_config.json").read_bytes() if config is None else config
        return self.client.put(
            f"/v1/adapters/{name}",
            params=query,
            content=(files / "adapter_model.safetensors").read_bytes(),
            headers={"x-loramux-adapter-config": base64.b64encode(config).decode()},
        )

    def tokens(self, name: str, **more: Any) -> list[int]:
        answer = self.post(
            "/v1/completions", model=name, **{**GREEDY, "return_token_ids": True, **more}
        )
        assert answer.status_code == 200, answer.text
        return list(answer.json()["choices"][0]["token_ids"])

    def row(self, name: str) -> dict[str, Any]:
        return dict(self.client.get(f"/v1/adapters/{name}").json())

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[-1])

    @property
    def bytes_held(self) -> tuple[float, float]:
        names = ("loramux_adapter_host_bytes", "loramux_adapter_device_bytes")
        host, device = (self.metric(name) for name in names)
        return host, device

    @property
    def spooled(self) -> list[str]:
        return self.real._engine.require_store().spool.folders()


@pytest.fixture
def life(tiny_world: TinyWorld, tmp_path: Path) -> Iterator[Life]:
    with Life(tiny_world, tmp_path) as server:
        yield server
        server.app.state.loramux.draining = True
        inner = server.real._engine
        wait_until(lambda: not inner.has_requests)
    inner.check_integrity()


def test_the_version_is_told_everywhere(life: Life) -> None:
    digests = [life.load(name, folder).headers["x-loramux-digest"] for name, folder in ["xa", "yb"]]
    assert len(set(digests)) == 2 and all(len(digest) == 64 for digest in digests)
    for name, digest in zip("xy", digests, strict=True):
        assert life.client.get(f"/v1/models/{name}").json()["digest"] == digest
        row = life.row(name)
        assert row["digest"] == digest and (row["state"], row["place"]) == ("ready", "host")
        assert row["last_used"] is None and row["users"] == 0 and row["load_seconds"] > 0
    for stream in (False, True):
        answer = life.post(
            "/v1/completions", model="base", lora=["y", "x"], stream=stream, **GREEDY
        )
        named = f"y@{digests[1][:12]},x@{digests[0][:12]}"
        assert answer.headers["x-loramux-adapters"] == named
        assert answer.headers["x-loramux-affinity"] == "x+y"
    base = life.post("/v1/completions", model="base", **GREEDY)
    assert not {"x-loramux-adapters", "x-loramux-affinity"} & set(base.headers)
    assert life.row("x")["place"] == "device" and life.row("x")["last_used"] > 0
    page = life.client.get("/metrics").text
    assert f'loramux_adapter_on_device{{adapter="x",digest="{digests[0]}"}} 1.0' in page


def test_compare_and_set_over_http(life: Life) -> None:
    first = life.load("x", "a", expected_digest="none").headers["x-loramux-digest"]
    taken = life.load("x", "b", expected_digest="none", load_inplace=True)
    assert taken.status_code == 409
    assert taken.json()["error"]["code"] == "adapter_conflict"
    assert taken.json()["error"]["current_digest"] == first
    second = life.load("x", "b", expected_digest=first[:12], load_inplace=True)
    digest = second.headers["x-loramux-digest"]
    assert second.status_code == 200 and digest != first
    for late in (
        life.load("x", "c", expected_digest=first, load_inplace=True),
        life.push("x", "c", expected_digest=first),
        life.post(UNLOAD, lora_name="x", expected_digest=first),
    ):
        assert late.status_code == 409 and late.json()["error"]["current_digest"] == digest
    assert life.load("new", "c", expected_digest=first).json()["error"]["current_digest"] is None
    for wrong in ("abc", "g" * 64, "None", 7):
        bad = life.load("x", "c", expected_digest=wrong, load_inplace=True)
        assert bad.status_code == 400 and bad.json()["error"]["param"] == "expected_digest"
    assert life.push("x", "c", expected_digest="short").status_code == 400
    assert life.row("x")["digest"] == digest
    assert life.post(UNLOAD, lora_name="x", expected_digest=digest).status_code == 200


def test_pushed_weights_answer_like_those_of_a_folder(life: Life) -> None:
    for name in "ab":
        life.load(name, name)
    expected = {name: life.tokens(name) for name in "ab"}
    pushed = life.push("org/x", "a")
    assert pushed.status_code == 200
    assert pushed.json()["digest"] == life.row("a")["digest"], "equal bytes are one version"
    assert life.tokens("org/x") == expected["a"]
    assert life.push("org/x", "b").headers["x-loramux-digest"] == life.row("b")["digest"]
    assert life.tokens("org/x") == expected["b"]
    life.post(UNLOAD, lora_name="a")
    life.post(UNLOAD, lora_name="b")
    for _ in range(5):
        assert life.push("org/x", "b").status_code == 200
    wait_until(lambda: len(life.spooled) == 1)
    life.load("c", "c")
    life.load("d", "d")
    life.load("a", "a")  # of three in host memory: the pushed one must be read again
    assert life.row("org/x")["place"] in ("disk", "device")
    for name in "cda":
        life.tokens(name)
    assert life.tokens("org/x") == expected["b"]
    life.post(UNLOAD, lora_name="org/x", drain_s=5)
    wait_until(lambda: not life.spooled)


def test_pushes_that_are_refused_leave_nothing(life: Life) -> None:
    for answer, status, code in (
        (life.push("x", "a", b"{"), 400, "adapter_rejected"),
        (life.push("x", "a", b'{"peft_type": "LORA"}'), 400, "adapter_rejected"),
        (life.push("x", "a", b""), 400, "invalid_value"),
        (life.push("base", "a"), 409, "adapter_exists"),
        (life.push(".x", "a"), 400, "invalid_value"),
        (life.push("x", "a", pinned="maybe"), 400, "invalid_value"),
    ):
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"] == code
    assert life.client.get("/v1/adapters").json()["data"] == [] and not life.spooled
    assert life.bytes_held == (0, 0)


def test_an_unload_without_drain_lets_requests_finish(life: Life) -> None:
    life.load("x", "a")
    alone = life.tokens("x", max_tokens=60)
    answers: queue.Queue[list[int]] = queue.Queue()
    threads = [
        threading.Thread(target=lambda: answers.put(life.tokens("x", max_tokens=60)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: life.real.stats().running == 4)
    assert life.post(UNLOAD, lora_name="x").status_code == 200
    assert life.post("/v1/completions", model="x", **GREEDY).status_code == 404
    for thread in threads:
        thread.join()
    assert [answers.get() for _ in threads] == [alone] * 4
    wait_until(lambda: life.bytes_held == (0, 0))


def test_a_drain_waits_and_then_frees_all_memory(life: Life) -> None:
    life.load("x", "a")
    life.load("y", "b")
    life.tokens("y")
    kept = life.bytes_held
    answers: queue.Queue[int] = queue.Queue()

    def ask() -> None:
        body = {**GREEDY, "max_tokens": 60}
        answers.put(life.post("/v1/completions", model="x", **body).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: life.row("x").get("users") == 1)
    done = life.post(UNLOAD, lora_name="x", drain_s=30)
    assert done.text == "Success: LoRA adapter 'x' removed successfully."
    assert life.real.stats().running == 0, "it answers when the last request has ended"
    assert life.bytes_held == (life.row("y")["bytes"], kept[1]) and kept[0] > life.bytes_held[0]
    thread.join()
    assert answers.get() == 200
    life.post(UNLOAD, lora_name="y", drain_s=0)
    assert life.bytes_held == (0, 0)


@pytest.mark.parametrize("drain_s", [0, 0.05])
def test_at_the_end_of_a_drain_requests_end_with_an_error(life: Life, drain_s: float) -> None:
    life.load("x", "a")
    life.load("y", "a")  # the same version under another name
    answers: queue.Queue[httpx.Response] = queue.Queue()

    def ask(stream: bool) -> None:
        answers.put(life.post("/v1/completions", model="x", stream=stream, **LONG))

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    wait_until(lambda: life.real.stats().running > 24)
    shared = life.post(UNLOAD, lora_name="y", drain_s=0)
    assert "still in use" in shared.text and life.real.stats().running > 24
    done = life.post(UNLOAD, lora_name="x", drain_s=drain_s)
    assert "2 of its requests were ended" in done.text
    assert life.bytes_held == (0, 0)
    for thread in threads:
        thread.join()
    for _ in threads:
        answer = answers.get()
        error = (
            json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))
            if answer.status_code == 200
            else answer.json()
        )["error"]
        assert answer.status_code in (200, 503)
        assert error["code"] == "adapter_unloaded" and "had" in error["message"]
    life.load("x", "b")
    assert life.tokens("x")


def test_pins_keep_their_places(life: Life) -> None:
    life.load("p", "a", pinned=True)
    wait_until(lambda: life.row("p")["place"] == "device")
    for name in "bcd":
        life.load(name, name)
        life.tokens(name)
        row = life.row("p")
        assert row["place"] == "device" and row["pinned"] is True
    store = life.real._engine.require_store()
    assert row["digest"] in store.host
    refused = life.post(PIN, lora_name="b")
    assert refused.status_code == 409 and refused.json()["error"]["code"] == "pin_refused"
    assert life.load("e", "b", pinned=True).status_code == 409
    assert life.push("e", "b", pinned=True).status_code == 409
    assert life.client.get("/v1/adapters/e").status_code == 404
    body = {"model": "base", "lora": ["b", "c"], **GREEDY}
    too_many = life.post("/v1/completions", **body)
    assert too_many.status_code == 400 and "unpin" in too_many.json()["error"]["message"]
    digest = life.load("p", "c", load_inplace=True).headers["x-loramux-digest"]
    wait_until(lambda: life.row("p")["place"] == "device")
    assert life.row("p")["pinned"] and life.row("p")["digest"] == digest
    assert life.post(UNPIN, lora_name="p").status_code == 200
    assert life.post("/v1/completions", **body).status_code == 200
    assert life.load("b", "b", load_inplace=True, pinned=True).status_code == 200
    life.post(UNLOAD, lora_name="b", drain_s=5)
    assert life.post(PIN, lora_name="b").status_code == 404
    assert life.post(PIN, lora_name="c").status_code == 200


def test_a_pinned_adapter_that_cannot_be_read_is_pinned_no_longer(life: Life) -> None:
    life.load("p", "a")
    for name in "bcd":
        life.load(name, name)
    assert life.row("p")["place"] == "disk"
    shutil.rmtree(life.root / "a")
    life.post(PIN, lora_name="p")
    wait_until(lambda: not life.row("p")["pinned"])
    assert life.post("/v1/completions", model="p", **GREEDY).status_code == 500
    assert life.tokens("b")


class Listening:
    """A client of the stream of events, in a thread."""

    def __init__(self, life: Life) -> None:
        self.events: list[dict[str, Any]] = []
        self._life = life
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        wait_until(lambda: bool(self.events))

    def _listen(self) -> None:
        with httpx.stream("GET", f"{self._life.url}/v1/adapters/events") as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.events.append(json.loads(line.removeprefix("data: ")))

    def kinds(self, *more: str) -> list[tuple[str, ...]]:
        return [tuple(str(e[key]) for key in ("event", "name", *more)) for e in self.events[1:]]

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


def test_the_stream_of_events(life: Life) -> None:
    life.load("a", "a")
    listening = Listening(life)
    assert listening.events[0]["event"] == "snapshot"
    assert listening.events[0]["data"] == [life.row("a")]
    life.tokens("a")
    life.load("a", "b", load_inplace=True)
    life.post(UNLOAD, lora_name="a", drain_s=5)
    wait_until(lambda: len(listening.events) >= 6)
    told = ["device-loaded", "replaced", "gone", "host-loaded", "gone"]
    assert listening.kinds() == [(kind, "a") for kind in told]
    for name in "abcd":
        life.load(name, name)
        life.tokens(name)
    wait_until(
        lambda: ("evicted", "a", "host") in [(*k, e["place"]) for k, e in evictions(listening)]
    )
    assert ("evicted", "a", "device") in [(*k, e["place"]) for k, e in evictions(listening)]
    numbers = [event["number"] for event in listening.events[1:]]
    assert numbers == sorted(set(numbers))


def evictions(listening: Listening) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    paired = zip(listening.kinds(), listening.events[1:], strict=False)
    return [(kind, event) for kind, event in paired if kind[0] == "evicted"]


def test_a_slow_listener_hears_that_it_was_dropped(life: Life) -> None:
    feed = life.real._engine.require_store().feed
    listening = Listening(life)
    with feed._lock:
        listener = feed._listeners[0]
    listener._capacity = 0
    life.load("a", "a")
    listening.join()
    assert listening.events[-1]["event"] == "dropped" and feed.num_listeners == 0


def test_a_listener_that_leaves_is_forgotten_and_the_server_stops_with_one(life: Life) -> None:
    feed = life.real._engine.require_store().feed
    with httpx.stream("GET", f"{life.url}/v1/adapters/events") as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        assert feed.num_listeners == 1
    wait_until(lambda: feed.num_listeners == 0)
    listening = Listening(life)
    life.app.state.loramux.draining = True
    listening.join()


def test_caps_on_size_and_number(tiny_world: TinyWorld, tmp_path: Path) -> None:
    size = (tiny_world.adapters["a"] / "adapter_model.safetensors").stat().st_size
    with Life(tiny_world, tmp_path, max_adapter_bytes=size, max_registered_adapters=2) as life:
        assert life.load("a", "a").status_code == 200
        for answer, status in ((life.load("b", "b"), 400), (life.push("b", "b"), 413)):
            assert answer.status_code == status, answer.text
            assert "--max-adapter-bytes" in answer.json()["error"]["message"]
        assert life.push("x", "a").status_code == 200
        for full in (life.load("c", "c"), life.push("c", "c")):
            assert full.status_code == 403
            assert "--max-registered-adapters" in full.json()["error"]["message"]
        assert life.load("a", "c", load_inplace=True).status_code == 200
        life.post(UNLOAD, lora_name="x")
        assert life.load("c", "c").status_code == 200
        assert not life.spooled or wait_until(lambda: not life.spooled) is None
