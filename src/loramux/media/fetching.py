"""GET of a media URL that a stranger wrote (SSRF): each hop is checked, then connected as checked.

    allowed host? ─▶ resolve once ─▶ every address public? ─▶ connect to one of these ─▶ TLS for the name
         ▲                                                                                    │
         └──────────── a redirect is a new URL, with nothing of the old one ◀──────────── answer

One deadline covers all of it. Proxies, cookies and credentials do not exist here.
"""

from __future__ import annotations

import functools
import socket
import ssl
import threading
import time
from concurrent.futures import Future
from typing import Any

import h11

from loramux.config import MediaConfig
from loramux.errors import BadMedia, Forbidden, MediaUnavailable
from loramux.media.addresses import is_public
from loramux.media.sources import DEFAULT_PORTS, Remote, redirected

MAX_HEADER_BYTES = 64 << 10
MAX_ADDRESSES = 4
RECEIVE_BYTES = 64 << 10
REDIRECTS = (301, 302, 303, 307, 308)

Address = tuple[int, Any]  # family and socket address, as getaddrinfo gives them


class Deadline:
    """A moment after which nothing is waited for."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, more than 0; raises MediaUnavailable when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise MediaUnavailable(f"the media were not there within {self.seconds:g} s")
        return left


def fetch(source: Remote, config: MediaConfig, deadline: Deadline | None = None) -> bytes:
    """The body at `source`, at most `config.max_media_bytes`. Blocks, up to the deadline.

    Raises Forbidden for a host that is not allowed or not public, BadMedia for a body that is too large,
    MediaUnavailable for a host that does not answer as it should, or not in time.
    """
    deadline = deadline or Deadline(config.fetch_timeout_s)
    for _ in range(config.max_redirects + 1):
        _check_allowed(source, config.allowed_media_domains)
        try:
            answer = _get(source, deadline, config.max_media_bytes)
        except (OSError, h11.ProtocolError) as error:
            deadline.left()  # raises when it was a timeout
            reason = getattr(error, "reason", None) or type(error).__name__
            raise MediaUnavailable(f"{source.origin} cannot be read: {reason}") from error
        if isinstance(answer, bytes):
            return answer
        source = answer
    raise MediaUnavailable(f"the URL redirects more than {config.max_redirects} times")


def _check_allowed(source: Remote, domains: list[str]) -> None:
    if not domains:
        raise Forbidden(
            "media from URLs are not allowed on this server",
            remedy="send a data: URL, or have the operator set allowed_media_domains",
        )
    for domain in domains:
        name, _, port = domain.partition(":")
        if source.port != (int(port) if port else DEFAULT_PORTS[source.scheme]):
            continue
        if name in ("*", source.host) or (
            name.startswith(".") and f".{source.host}".endswith(name)
        ):
            return
    raise Forbidden(
        f"media from {source.origin} are not allowed on this server",
        remedy="use a host of allowed_media_domains, or send a data: URL",
    )


def _get(source: Remote, deadline: Deadline, max_bytes: int) -> bytes | Remote:
    """The body, or where to go instead."""
    addresses = _public_addresses(source, deadline)
    with _connect(addresses, deadline) as plain:
        if source.scheme == "http":
            return _exchange(plain, source, deadline, max_bytes)
        plain.settimeout(deadline.left())
        with _tls_context().wrap_socket(plain, server_hostname=source.host) as encrypted:
            return _exchange(encrypted, source, deadline, max_bytes)


def _public_addresses(source: Remote, deadline: Deadline) -> list[Address]:
    """What the host's name means now. One address that is not public refuses the host."""
    found = _resolve(source.host, source.port, deadline)
    if not found or not all(is_public(str(address[0])) for _, address in found):
        # Which address it is stays here: the names of an inner network are nobody's business.
        raise Forbidden(
            f"{source.origin} does not lead to a public address", remedy="send a data: URL"
        )
    return found[:MAX_ADDRESSES]


def _resolve(host: str, port: int, deadline: Deadline) -> list[Address]:
    """The system's resolver. It knows no deadline, so it has a thread that is left behind then."""
    answer: Future[list[Address]] = Future()

    def look_up() -> None:
        try:
            rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answer.set_result([(family, address) for family, _, _, _, address in rows])
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=look_up, name="media-resolve", daemon=True).start()
    try:
        return answer.result(timeout=deadline.left())
    except (socket.gaierror, UnicodeError):
        raise MediaUnavailable(f"there is no host {host!r}") from None


def _connect(addresses: list[Address], deadline: Deadline) -> socket.socket:
    """A connection to the first address that takes one; each gets its share of the time left."""
    for position, (family, address) in enumerate(addresses):
        last = position == len(addresses) - 1
        try:
            return _open(family, address, deadline.left() / (len(addresses) - position))
        except OSError:
            if last:
                raise
    raise AssertionError("no address to connect to")


def _open(family: int, address: Any, timeout_s: float) -> socket.socket:
    """A TCP connection. `create_connection` would ask the resolver once more."""
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


@functools.cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _exchange(
    connection: socket.socket, source: Remote, deadline: Deadline, max_bytes: int
) -> bytes | Remote:
    """One request and its answer, counted while it comes."""
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEADER_BYTES)
    headers = [
        ("Host", source.authority),
        ("User-Agent", "loramux"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    request = h11.Request(method="GET", target=source.target, headers=headers)
    connection.settimeout(deadline.left())
    connection.sendall((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
    body = bytearray()
    while True:
        connection.settimeout(deadline.left())
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(connection.recv(RECEIVE_BYTES))
        elif isinstance(event, h11.Response):
            target = _check_head(event, source, max_bytes)
            if target is not None:
                return target
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > max_bytes:
                raise _too_large(source, max_bytes)
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)
        elif isinstance(event, h11.ConnectionClosed):
            raise MediaUnavailable(f"{source.origin} closed the connection without an answer")


def _check_head(response: h11.Response, source: Remote, max_bytes: int) -> Remote | None:
    """Where the answer redirects to, None if its body is wanted; raises for any other answer."""
    headers = dict(response.headers)
    if response.status_code in REDIRECTS and b"location" in headers:
        return redirected(source, headers[b"location"].decode("utf-8", "surrogateescape"))
    if response.status_code != 200:
        raise MediaUnavailable(f"{source.origin} answered with status {response.status_code}")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise MediaUnavailable(f"{source.origin} compresses its answer though it was asked not to")
    if int(headers.get(b"content-length", b"0")) > max_bytes:
        raise _too_large(source, max_bytes)
    return None


def _too_large(source: Remote, max_bytes: int) -> BadMedia:
    return BadMedia(f"what {source.origin} sends is larger than the {max_bytes} bytes allowed")
