"""Replicas on a local Ray as a user starts them: affinity, residency, live loads, a kill, drain."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from fleet_server import PATIENCE_S, FleetServer, kill, wait_until
from safetensors.torch import load_file, save_file
from zipf import lru_hit_rate, trace

from tiny import save_adapter, save_model

NUM_ADAPTERS, NUM_PLACES, NUM_REQUESTS = 64, 8, 900
TARGET = 12  # requests a replica; only the last test has more
KEY = "secret"
LONG = {"max_tokens": 600, "ignore_eos": True}  # seconds


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a long context, so that an answer can take seconds."""
    return save_model(tmp_path_factory.mktemp("long") / "model", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """64 adapters of rank 4: with --max-lora-rank 4, places are for 8 of them and no more."""
    root = tmp_path_factory.mktemp("adapters")
    first = save_adapter(model, root / "n0", r=4)
    weights = load_file(first / "adapter_model.safetensors")
    for i in range(1, NUM_ADAPTERS):
        shutil.copytree(first, root / f"n{i}")
        torch.manual_seed(i)
        random = {name: torch.randn_like(weight) * 0.1 for name, weight in weights.items()}
        save_file(random, root / f"n{i}" / "adapter_model.safetensors", {"format": "pt"})
    return [root / f"n{i}" for i in range(NUM_ADAPTERS)]


@pytest.fixture(scope="module")
def server(model: Path, adapters: list[Path]) -> Iterator[FleetServer]:
    flags = ["--min-replicas", "2", "--max-replicas", "3", "--target-ongoing-requests", f"{TARGET}"]
    flags += [
        "--upscale-delay-s",
        "0",
        "--downscale-delay-s",
        "1",
        "--api-key",
        KEY,
        "--enable-lora",
        "--max-lora-rank",
        "4",
    ]
    flags += ["--max-loras", str(NUM_PLACES), "--max-cpu-loras", str(NUM_ADAPTERS + 2)]
    flags += ["--allow-runtime-lora-updating", "--lora-root", str(adapters[0].parent)]
    modules = [f"{path.name}={path}" for path in adapters[1:]]  # n0 is loaded live
    with FleetServer(model, *flags, "--lora-modules", *modules) as server:
        server.client.headers["Authorization"] = f"Bearer {KEY}"
        yield server
    assert server.process.returncode == 0


def test_the_api_is_the_single_servers(server: FleetServer) -> None:
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert server.client.get("/health").json() == {"status": "ok"}
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    chunks = client.chat.completions.create(
        model="n1", messages=[{"role": "user", "content": "hey"}], stream=True, max_tokens=50,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    composed = server.complete(lora=[{"name": "n1", "scale": 0.5}, "n2"])
    assert composed.status_code == 200 and "n2@" in composed.headers["x-loramux-adapters"]
    unknown, bad = server.complete(model="nobody"), server.complete(suffix="x")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "suffix")


def test_a_stream_comes_while_it_is_made_and_ends_when_its_client_leaves(
    server: FleetServer,
) -> None:
    def num_steps() -> float:
        return sum(server.samples("loramux_engine_steps_total").values())

    body = {"model": "n1", "prompt": "hey", "stream": True, **LONG, "max_tokens": 3500}
    before = num_steps()
    with server.client.stream("POST", "/v1/completions", json=body) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: {")
        running = server.samples("loramux_requests_running")
        assert sum(running.values()) == 1
    wait_until(lambda: sum(server.samples("loramux_requests_running").values()) == 0)
    assert num_steps() - before < 3500  # or it was made to its end


def test_a_live_load_is_on_both_replicas_or_on_none(server: FleetServer) -> None:
    def change(what: str, **body: str) -> int:
        return server.client.post(f"/v1/{what}_lora_adapter", json=body).status_code

    def listed() -> set[bool]:
        lists = [server.client.get("/v1/models").text for _ in range(8)]
        assert len(set(lists)) == 1  # whichever replica is asked
        return {'"n0"' in text for text in lists}

    assert change("load", lora_name="n0", lora_path="n0") == 200 and listed() == {True}
    served = server.samples("loramux_adapter_on_host")
    assert (served["0", "n0"], served["1", "n0"]) == (1.0, 1.0)
    assert change("load", lora_name="n0", lora_path="n0") == 409
    assert change("load", lora_name="bad", lora_path=".") == 400 and "bad" not in str(listed())
    assert change("unload", lora_name="n0") == 200 and listed() == {False}
    assert change("load", lora_name="n0", lora_path="n0") == 200 and listed() == {True}


def test_affinity_and_residency(server: FleetServer, capsys: pytest.CaptureFixture[str]) -> None:
    asked = trace(NUM_ADAPTERS, NUM_REQUESTS)
    requests, loads = "loramux_requests_total", "loramux_adapter_device_loads_total"
    before, loads_before = server.samples(requests), sum(server.samples(loads).values())
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda i: server.complete(model=f"n{i}").status_code, asked))
    assert set(replies) == {200}
    after = {key: n - before.get(key, 0) for key, n in server.samples(requests).items()}
    num_loads = sum(server.samples(loads).values()) - loads_before

    stayed = sum(max(after.get((r, f"n{i}"), 0) for r in "01") for i in range(NUM_ADAPTERS))
    hit_rate = 1 - num_loads / NUM_REQUESTS
    one_cache = lru_hit_rate([asked], 2 * NUM_PLACES)
    alternating = lru_hit_rate([asked[::2], asked[1::2]], NUM_PLACES)
    with capsys.disabled():
        print(
            f"\n{NUM_REQUESTS} requests, zipf over {NUM_ADAPTERS} adapters, 2 replicas of "
            f"{NUM_PLACES} places: on one replica {stayed / NUM_REQUESTS:.1%}, hits {hit_rate:.1%}; "
            f"one LRU of {2 * NUM_PLACES}: {one_cache:.1%}; any replica: {alternating:.1%}"
        )
    assert sum(after.values()) == NUM_REQUESTS
    assert stayed / NUM_REQUESTS >= 0.95
    assert abs(hit_rate - one_cache) <= 0.05 and hit_rate > alternating + 0.05


def test_a_killed_replica_loses_nothing_that_had_not_begun(server: FleetServer) -> None:
    def ask(i: int) -> httpx.Response:
        return server.complete(model=f"n{i // 2}", **LONG, stream=i % 4 == 0)

    with ThreadPoolExecutor(16) as pool:
        replies = [pool.submit(ask, i) for i in range(16)]
        wait_until(lambda: sum(server.samples("loramux_requests_running").values()) == 16)
        kill(server.pids("Replica")[0])
        kill(server.pids("Catalog")[0])  # the next one learns what is served from who is left
        whole = [reply.result() for i, reply in enumerate(replies) if i % 4]
        streams = [reply.result() for i, reply in enumerate(replies) if i % 4 == 0]
    assert {reply.status_code for reply in whole} == {200}
    assert all(reply.json()["usage"]["completion_tokens"] == 600 for reply in whole)
    for reply in streams:
        events = reply.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert '"finish_reason":"length"' in events[-3] or "engine_stopped" in events[-3]

    wait_until(lambda: server.num_replicas() == 2)
    served = server.samples("loramux_adapter_on_host")  # the new one has learnt the live load too
    assert all(("0", f"n{i}") in served and ("1", f"n{i}") in served for i in range(NUM_ADAPTERS))


def test_replicas_come_with_the_queue_and_go_without_losing_a_request(server: FleetServer) -> None:
    stop = threading.Event()

    def load(_: int) -> set[int]:
        codes = set()
        while not stop.is_set():
            codes.add(server.complete(model="base", **{**LONG, "max_tokens": 100}).status_code)
        return codes

    assert server.num_replicas() == 2
    with ThreadPoolExecutor(4 * TARGET) as pool:
        codes = [pool.submit(load, i) for i in range(4 * TARGET)]
        try:
            wait_until(lambda: server.num_replicas() == 3)
            on_host = server.samples("loramux_adapter_on_host")
        finally:
            stop.set()  # or the pool waits for ever, whatever failed
        # The new one has learnt the live load.
        assert {name for replica, name in on_host if replica == "2"} >= {"n0", "n1"}
        # Answers that last while Ray takes one of the three replicas away.
        long = LONG | {"max_tokens": 2000}
        last = [pool.submit(server.complete, model="base", **long) for _ in range(6)]
        wait_until(lambda: server.num_replicas() == 2)
        assert set.union(*(future.result() for future in codes)) == {200}
        assert {future.result().status_code for future in last} == {200}
    lists = {server.client.get("/v1/models").text for _ in range(4)}
    assert len(lists) == 1 and server.complete(model="n0").status_code == 200


def test_requests_in_flight_end_after_sigterm(server: FleetServer) -> None:
    with ThreadPoolExecutor(3) as pool:
        replies = [pool.submit(server.complete, model=f"n{i}", **LONG) for i in range(3)]
        wait_until(lambda: sum(server.samples("loramux_requests_running").values()) == 3)
        server.process.send_signal(signal.SIGTERM)
        usages = [reply.result().json()["usage"]["completion_tokens"] for reply in replies]
    assert usages == [600] * 3 and server.process.wait(PATIENCE_S) == 0


def test_a_start_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loramux", "serve", str(tmp_path), "--replicas", "1"]
    without_ray = (
        "import sys; sys.modules['ray'] = None\n"
        "from loramux.cli import main\n"
        f"sys.exit(main({command[3:]!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", without_ray], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 2 and "pip install 'loramux[ray]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
