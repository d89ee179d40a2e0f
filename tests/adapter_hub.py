"""A local stand-in for the Hugging Face Hub that serves folders as repositories, and counts."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class AdapterHub:
    """`repositories` are name -> revision -> folder. A folder's commit is made of its bytes.

    `spoil` may change what is sent of a file, `token` is required where it is set."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Path]] = {}
        self.requests: list[str] = []
        self.tokens: list[str | None] = []
        self.token: str | None = None
        self.spoil: Callable[[str, bytes], bytes] = lambda name, body: body
        self.failing = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub._answer(self, with_body=False)

            def do_GET(self) -> None:
                hub._answer(self, with_body=True)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def bodies(self) -> list[str]:
        return [request for request in self.requests if request.startswith("GET")]

    @staticmethod
    def commit_of(folder: Path) -> str:
        hashed = hashlib.sha1()
        for path in sorted(folder.iterdir()):
            hashed.update(path.name.encode() + path.read_bytes())
        return hashed.hexdigest()

    def _answer(self, handler: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        if "/resolve/" not in handler.path:  # the client's own questions
            self._refuse(handler, 404, None)
            return
        self.requests.append(f"{handler.command} {handler.path}")
        self.tokens.append(handler.headers.get("Authorization"))
        if self.failing:
            self._refuse(handler, 500, None)
            return
        if self.token is not None and self.tokens[-1] != f"Bearer {self.token}":
            self._refuse(handler, 401, "RepoNotFound")
            return
        org, name, _, *rest = handler.path.split("?")[0].strip("/").split("/")
        revisions = self.repositories.get(f"{org}/{name}")
        if revisions is None:
            self._refuse(handler, 404, "RepoNotFound")
            return
        commits = {self.commit_of(folder): folder for folder in revisions.values()}
        folder = (revisions | commits).get(rest[0])
        if folder is None:
            self._refuse(handler, 404, "RevisionNotFound")
            return
        path = folder / rest[1]
        if not path.is_file():
            self._refuse(handler, 404, "EntryNotFound")
            return
        body = path.read_bytes()
        handler.send_response(200)
        handler.send_header("X-Repo-Commit", self.commit_of(folder))
        handler.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        sent = self.spoil(path.name, body) if with_body else body
        handler.send_header("Content-Length", str(len(sent)))
        handler.end_headers()
        if with_body:
            handler.wfile.write(sent)

    @staticmethod
    def _refuse(handler: BaseHTTPRequestHandler, status: int, code: str | None) -> None:
        handler.send_response(status)
        if code is not None:
            handler.send_header("X-Error-Code", code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
