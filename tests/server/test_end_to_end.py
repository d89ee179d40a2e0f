"""`loramux serve` as a user runs it: a real process, a real model, the official client."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from loramux import LLM, LoRARequest, SamplingParams
from tiny import TinyWorld

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
IGNORE = {"ignore_eos": True, "return_token_ids": True}


class Served:
    """A `loramux serve` process and where it listens."""

    def __init__(self, world: TinyWorld, root: Path, *flags: str):
        modules = [f"{n}={world.adapters[n]}" for n in "ab"]
        command = [sys.executable, "-m", "loramux", "serve", str(world.model), "--port", "0"]
        command += ["--device", "cpu", "--served-model-name", "base", "--enable-lora"]
        command += ["--max-loras", "2", "--max-lora-rank", "8", "--max-cpu-loras", "3"]
        command += ["--lora-modules", *modules, "--allow-runtime-lora-updating"]
        command += ["--lora-root", str(root), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = ""
        while not line.startswith("Listening on "):
            line = self.process.stdout.readline()
            assert line, "the server ended before it listened"
        self.url = line.removeprefix("Listening on ").strip()
        self.curl = self.process.stdout.readline()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def tokens(self, model: str, prompt: str = "hello", **extra: Any) -> list[int]:
        body = {**IGNORE, **extra}
        answer = self.client.completions.create(
            model=model, prompt=prompt, extra_body=body, **GREEDY
        )
        return list(answer.choices[0].token_ids)  # type: ignore[attr-defined]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def root(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    for name in "cd":
        shutil.copytree(tiny_world.adapters[name], root / name)
    (root / "out").symlink_to(tiny_world.adapters["a"])
    return root


@pytest.fixture(scope="module")
def served(tiny_world: TinyWorld, root: Path) -> Iterator[Served]:
    server = Served(tiny_world, root)
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def expected(tiny_world: TinyWorld) -> dict[str, list[int]]:
    """What the offline API answers, which the parity tests compare with PEFT."""
    params = SamplingParams(ignore_eos=True, **GREEDY)
    with LLM(str(tiny_world.model), enable_lora=True, max_loras=4, device="cpu") as llm:
        loras: dict[str, Any] = {
            n: LoRARequest(n, 1, str(p)) for n, p in tiny_world.adapters.items()
        }
        loras["0.7a+b"] = [LoRARequest("a", scale=0.7), LoRARequest("b")]
        loras["base"] = None
        return {
            name: llm.generate("hello", params, lora_request=lora)[0].outputs[0].token_ids
            for name, lora in loras.items()
        }


def test_models_base_adapters_and_compositions(
    served: Served, expected: dict[str, list[int]]
) -> None:
    assert {m.id for m in served.client.models.list()} >= {"base", "a", "b"}
    composition = [{"name": "a", "scale": 0.7}, {"name": "b"}]
    with ThreadPoolExecutor(12) as pool:
        futures = [
            (name, pool.submit(served.tokens, *args, **extra))
            for _ in range(4)
            for name, args, extra in [
                ("base", ["base"], {}),
                ("a", ["a"], {}),
                ("b", ["b"], {}),
                ("0.7a+b", ["base"], {"lora": composition}),
            ]
        ]
        for name, future in futures:
            assert future.result() == expected[name], name


def test_streaming_chat_with_usage(served: Served) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    whole = served.client.chat.completions.create(
        model="a", messages=messages, extra_body=IGNORE, **GREEDY
    )
    chunks = list(
        served.client.chat.completions.create(
            model="a",
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=IGNORE,
            **GREEDY,
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == 6
    finishes = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert finishes[-1] == "length"


def test_live_load_replace_and_unload(
    served: Served, root: Path, expected: dict[str, list[int]]
) -> None:
    def post(path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{served.url}/v1/{path}", json=body, timeout=30)

    assert post("load_lora_adapter", lora_name="x", lora_path="c").status_code == 200
    assert served.tokens("x") == expected["c"]
    assert post("load_lora_adapter", lora_name="x", lora_path="d").status_code == 409
    assert (
        post("load_lora_adapter", lora_name="x", lora_path="d", load_inplace=True).status_code
        == 200
    )
    assert served.tokens("x") == expected["d"]
    assert post("unload_lora_adapter", lora_name="x").status_code == 200
    with pytest.raises(openai.NotFoundError):
        served.tokens("x")
    for path, status in [("out", 403), ("../..", 403), ("nothing", 404), ("/etc", 403)]:
        assert post("load_lora_adapter", lora_name="y", lora_path=path).status_code == status, path
    (root / "bad").mkdir(exist_ok=True)
    refused = post("load_lora_adapter", lora_name="y", lora_path="bad")
    assert refused.status_code == 400 and "adapter_config.json" in refused.text


def test_bad_input_harms_nobody(served: Served, expected: dict[str, list[int]]) -> None:
    with ThreadPoolExecutor(8) as pool:
        good = [pool.submit(served.tokens, "a") for _ in range(6)]
        bad = [
            {"model": "nobody", "prompt": "x"},
            {"model": "base", "prompt": "x" * 300},
            {"model": "base", "prompt": "x", "max_tokens": 9999},
            {"model": "base", "prompt": "x", "no_such_field": 1},
            {"model": "base", "prompt": [999999]},
            {"model": "base", "prompt": "x", "lora": [{"name": "nobody"}]},
        ]
        for body in bad:
            response = httpx.post(f"{served.url}/v1/completions", json=body, timeout=30)
            assert 400 <= response.status_code < 500, body
            assert response.json()["error"]["message"]
        assert all(future.result() == expected["a"] for future in good)


def test_a_client_that_leaves_frees_its_request(served: Served) -> None:
    body = {"model": "a", "prompt": "x", "max_tokens": 250, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=30) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 10
    while _metric(served, "loramux_requests_running") + _metric(served, "loramux_requests_waiting"):
        assert time.monotonic() < deadline, "the request runs on without a client"
        time.sleep(0.05)


def test_metrics_tell_of_each_adapter(served: Served) -> None:
    served.tokens("b")
    text = httpx.get(f"{served.url}/metrics").text
    for name in (
        "requests_total",
        "generation_tokens_total",
        "time_to_first_token",
        "adapter_load",
    ):
        assert f"loramux_{name}" in text
    assert 'adapter="b"' in text


def _metric(served: Served, name: str) -> float:
    text = httpx.get(f"{served.url}/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_the_printed_curl_is_a_request(served: Served) -> None:
    body = json.loads(served.curl.split("-d ")[1].strip().strip("'"))
    response = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200


@pytest.mark.parametrize("patience", ["30", "0"])
def test_shutdown_answers_everybody(tiny_world: TinyWorld, root: Path, patience: str) -> None:
    server = Served(tiny_world, root, "--shutdown-timeout-s", patience)
    ends: list[str] = []

    def ask() -> None:
        try:
            stream = server.client.completions.create(
                model="a",
                prompt="hello",
                stream=True,
                max_tokens=240,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            last = [chunk.choices[0].finish_reason for chunk in stream][-1]
            ends.append(last or "silence")
        except openai.APIError:
            ends.append("error")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    while _metric(server, "loramux_requests_running") < 4:
        time.sleep(0.01)
    assert server.stop() == 0
    for thread in threads:
        thread.join(30)
    allowed = {"length"} if patience == "30" else {"length", "error"}
    assert len(ends) == 4 and set(ends) <= allowed


def test_errors_are_one_line_with_the_remedy(tiny_world: TinyWorld) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "loramux", *arguments]
        env = {**os.environ, "COLUMNS": "200"}
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)

    model = str(tiny_world.model)
    refused = run("serve", model, "--enable-lora", "--lora-target-modules", "no_such_proj")
    assert refused.returncode == 2 and "target_modules" in refused.stderr
    missing = run("serve", "/nowhere/at/all")
    assert missing.returncode == 2 and "Traceback" not in missing.stderr
    report = run("adapter", "check", str(tiny_world.adapters["a"]), "--model", model)
    assert report.returncode == 0 and "42 tensors bind to 21 modules" in report.stdout
    bad = run("adapter", "check", model, "--model", model)
    assert bad.returncode == 1 and "adapter_config.json is missing" in bad.stdout + bad.stderr
