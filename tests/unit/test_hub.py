"""`LLM("org/name")` through a local stand-in of the Hugging Face Hub, in a process of its own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tiny import TinyWorld

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import sys
from loramux import LLM, SamplingParams
from loramux.errors import ConfigError
try:
    with LLM(sys.argv[1], device="cpu", revision=sys.argv[2] or None) as llm:
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        print("tokens", llm.generate("hello", params)[0].outputs[0].token_ids)
except ConfigError as error:
    print("refused", error)
"""


class Hub:
    """Serves the files of one folder as the repository `org/tiny`, at revisions main and v1."""

    def __init__(self, folder: Path):
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def _answer(self, *, with_body: bool) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                parts = self.path.split("?")[0].strip("/").split("/")
                known = parts[:3] == ["org", "tiny", "resolve"] and parts[3] in (
                    "main",
                    "v1",
                    COMMIT,
                )
                path = folder / "/".join(parts[4:])
                if not known or not path.is_file():
                    of_ours = known or parts[:4] == ["api", "models", "org", "tiny"]
                    code = "EntryNotFound" if of_ours else "RepoNotFound"
                    self.send_response(404)
                    self.send_header("X-Error-Code", code)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                body = path.read_bytes()
                self.send_response(200)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def load(self, cache: Path, name: str, revision: str = "") -> str:
        env = {**os.environ, "HF_ENDPOINT": self.url, "HF_HOME": str(cache)}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        env.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-c", SCRIPT, name, revision]
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()


@pytest.fixture
def hub(tiny_world: TinyWorld) -> Iterator[Hub]:
    hub = Hub(tiny_world.model)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_a_hub_id_works_like_a_path(hub: Hub, tiny_world: TinyWorld, tmp_path: Path) -> None:
    local = hub.load(tmp_path / "unused", str(tiny_world.model))
    assert local.startswith("tokens [")
    assert hub.load(tmp_path / "cache", "org/tiny") == local
    assert any(r.startswith("GET") and r.endswith("model.safetensors") for r in hub.requests)
    hub.requests.clear()
    assert hub.load(tmp_path / "cache", "org/tiny", "v1") == local
    assert any("/resolve/v1/" in request for request in hub.requests)
    assert not any(r.startswith("GET") and r.endswith("model.safetensors") for r in hub.requests)


def test_what_the_hub_does_not_have_is_one_line(hub: Hub, tmp_path: Path) -> None:
    answer = hub.load(tmp_path, "org/other")
    assert answer.startswith("refused the model 'org/other' cannot be read")
    assert len(answer.splitlines()) == 1
