"""Hosts on this machine that play the internet: raw answers, scripted names, recorded connections."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loramux.media import fetching

Answer = bytes | Callable[[socket.socket], object]
PUBLIC = "93.184.216.34"
OTHER_PUBLIC = "151.101.1.69"


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def redirect(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


class Host:
    """Answers each connection with `answer`: bytes, or what a function does with it."""

    def __init__(self, answer: Answer):
        self.answer = answer
        self.requests: list[bytes] = []
        self.num_connections = 0
        self.closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            if self.closing.is_set():
                connection.close()
                return
            self.num_connections += 1
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        # The client may go away at any time: that is what most tests are about.
        with connection, contextlib.suppress(OSError):
            if callable(self.answer):
                self.answer(connection)
                return
            self.requests.append(read_head(connection))
            connection.sendall(self.answer)

    def close(self) -> None:
        self.closing.set()
        with socket.create_connection(("127.0.0.1", self.port)):
            pass
        for thread in self._threads:
            thread.join()
        self._listener.close()


def read_head(connection: socket.socket) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head and (received := connection.recv(4096)):
        head += received
    return head


class Internet:
    """Names and public addresses. A name's answers are used up in turn; the last one stays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.names: dict[str, list[list[str]]] = {}
        self.hosts: dict[str, Host] = {}
        self.looked_up: list[str] = []
        self.connected: list[tuple[str, int]] = []
        self._open = fetching._open
        monkeypatch.setattr(socket, "getaddrinfo", self._getaddrinfo)
        monkeypatch.setattr(fetching, "_open", self._connect)

    def add(self, name: str, answer: Answer, *answers: list[str], address: str = PUBLIC) -> Host:
        """A host at `address`, and what the name resolves to, lookup after lookup."""
        self.names[name] = list(answers) or [[address]]
        self.hosts[address] = Host(answer)
        return self.hosts[address]

    def _getaddrinfo(self, host: str, port: int, **options: Any) -> list[tuple[Any, ...]]:
        self.looked_up.append(host)
        if host not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        answers = self.names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in addresses
        ]

    def _connect(self, family: int, address: tuple[Any, ...], timeout_s: float) -> socket.socket:
        self.connected.append(address[:2])
        if address[0] not in self.hosts:
            raise ConnectionRefusedError("nobody there")
        return self._open(socket.AF_INET, ("127.0.0.1", self.hosts[address[0]].port), timeout_s)

    def close(self) -> None:
        for host in self.hosts.values():
            host.close()


@contextlib.contextmanager
def internet_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Internet]:
    internet = Internet(monkeypatch)
    try:
        yield internet
    finally:
        monkeypatch.undo()
        internet.close()
