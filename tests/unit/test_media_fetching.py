"""Fetching: only allowed hosts at public addresses, connected as checked, counted, and in time."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.config import MediaConfig
from loramux.errors import BadMedia, Forbidden, MediaUnavailable, RequestError
from loramux.media import Remote, fetching, parse_reference
from loramux.media.fetching import Deadline, fetch
from media_hosts import (
    OTHER_PUBLIC,
    PUBLIC,
    Host,
    Internet,
    internet_of,
    ok,
    read_head,
    redirect,
)

Answer = Callable[[socket.socket], object]


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Internet]:
    with internet_of(monkeypatch) as internet:
        yield internet


def get(url: str, domains: tuple[str, ...] = ("cdn.test",), **settings: Any) -> bytes:
    config = MediaConfig(allowed_media_domains=list(domains), **settings)
    source = parse_reference(url, config.max_media_bytes)
    assert isinstance(source, Remote)
    return fetch(source, config)


def until_closed(connection: socket.socket, piece: bytes, pause_s: float = 0.0) -> None:
    """Send `piece` again and again, until the client has gone."""
    gone = threading.Event()
    while True:
        connection.sendall(piece)
        gone.wait(pause_s)


# What is fetched


def test_a_body_with_a_length(internet: Internet) -> None:
    body = random.randbytes(100_000)
    host = internet.add("cdn.test", ok(body))
    assert get("http://cdn.test/a?b=c") == body
    assert internet.connected == [(PUBLIC, 80)]
    first, *headers = host.requests[0].decode().strip().split("\r\n")
    assert first == "GET /a?b=c HTTP/1.1"
    assert sorted(line.split(":")[0].lower() for line in headers) == [
        "accept-encoding",
        "connection",
        "host",
        "user-agent",
    ]
    assert "Host: cdn.test" in headers


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nabcde",
        b"HTTP/1.0 200 OK\r\nContent-Encoding: Identity\r\n\r\nabcde",
        b"HTTP/1.1 103 Early Hints\r\n\r\n" + ok(b"abcde"),
        ok(b"abcde") + b"more than was announced",
    ],
)
def test_bodies_in_every_framing(internet: Internet, answer: bytes) -> None:
    internet.add("cdn.test", answer)
    assert get("http://cdn.test/", max_media_bytes=5) == b"abcde"


def test_proxies_of_the_environment_are_not_used(
    internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://proxy.test:3128")
    internet.add("cdn.test", ok(b"direct"))
    assert get("http://cdn.test/") == b"direct"
    assert internet.looked_up == ["cdn.test"]


# Which hosts


@pytest.mark.parametrize(
    ("domains", "url"),
    [
        (("cdn.test",), "http://CDN.test./"),
        (("other.test", ".test"), "http://cdn.test/"),
        ((".cdn.test",), "http://cdn.test/"),
        (("*",), "http://cdn.test:80/"),
        (("cdn.test:8080",), "http://cdn.test:8080/"),
        (("*:8080",), "http://cdn.test:8080/"),
    ],
)
def test_allowed_hosts(internet: Internet, domains: tuple[str, ...], url: str) -> None:
    internet.add("cdn.test", ok(b"yes"))
    assert get(url, domains) == b"yes"


@pytest.mark.parametrize(
    ("domains", "url"),
    [
        ((), "http://cdn.test/"),
        (("other.test",), "http://cdn.test/"),
        (("dn.test",), "http://cdn.test/"),
        ((".dn.test",), "http://cdn.test/"),
        (("cdn.test",), "http://a.cdn.test/"),
        (("cdn.test",), "http://cdn.test.evil.test/"),
        ((".cdn.test",), "http://evilcdn.test/"),
        (("cdn.test",), "http://cdn.test:22/"),
        (("*",), "http://cdn.test:6379/"),
        (("cdn.test:8080",), "http://cdn.test/"),
        (("cdn.test:80",), "https://cdn.test/"),
    ],
)
def test_hosts_that_are_not_allowed_are_not_even_looked_up(
    internet: Internet, domains: tuple[str, ...], url: str
) -> None:
    with pytest.raises(Forbidden, match="not allowed"):
        get(url, domains)
    assert not internet.looked_up


def test_a_name_that_leads_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(ok(b"secret"))
    rows = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", host.port))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: rows)
    try:
        with pytest.raises(Forbidden, match="public address") as refused:
            get(f"http://cdn.test:{host.port}/", (f"cdn.test:{host.port}",))
        assert "127.0.0.1" not in str(refused.value)
        # Nothing else in the way: with that check off it would have been read.
        monkeypatch.setattr(fetching, "is_public", lambda _: True)
        assert get(f"http://cdn.test:{host.port}/", (f"cdn.test:{host.port}",)) == b"secret"
        assert host.num_connections == 1
    finally:
        host.close()


@pytest.mark.parametrize(
    "name",
    [
        "127.0.0.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "0",
        "[::1]",
        "[::ffff:7f00:1]",
    ],
)
def test_this_machine_by_address_in_any_spelling(name: str) -> None:
    host = Host(ok(b"secret"))
    try:
        with pytest.raises((Forbidden, MediaUnavailable)):
            get(f"http://{name}:{host.port}/", (f"*:{host.port}",))
        assert host.num_connections == 0
    finally:
        host.close()


@pytest.mark.parametrize(
    "addresses",
    [
        ["10.0.0.1"],
        [PUBLIC, "10.0.0.1"],
        ["169.254.169.254", PUBLIC],
        ["::1"],
        ["fe80::1%eth0"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["2002:7f00:1::"],
        [*[PUBLIC] * 10, "127.0.0.1"],
        [],
    ],
)
def test_one_address_that_is_not_public_refuses_the_host(
    internet: Internet, addresses: list[str]
) -> None:
    internet.add("cdn.test", ok(b"secret"), addresses)
    with pytest.raises(Forbidden, match="public address"):
        get("http://cdn.test/")
    assert not internet.connected


def test_a_name_that_changes_its_mind_is_asked_once(internet: Internet) -> None:
    internet.add("cdn.test", ok(b"public"), [PUBLIC], ["127.0.0.1"])
    assert get("http://cdn.test/") == b"public"
    assert internet.looked_up == ["cdn.test"]
    assert internet.connected == [(PUBLIC, 80)]
    with pytest.raises(Forbidden, match="public address"):
        get("http://cdn.test/")


def test_the_next_address_is_tried(internet: Internet) -> None:
    internet.add("cdn.test", ok(b"second"), [OTHER_PUBLIC, PUBLIC])
    assert get("http://cdn.test/") == b"second"
    assert internet.connected == [(OTHER_PUBLIC, 80), (PUBLIC, 80)]


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(internet: Internet, status: int) -> None:
    first = internet.add("cdn.test", redirect("http://img.test/b", status))
    second = internet.add("img.test", ok(b"there"), address=OTHER_PUBLIC)
    assert get("http://cdn.test/a", ("cdn.test", "img.test")) == b"there"
    assert first.requests[0].startswith(b"GET /a ")
    assert second.requests[0].startswith(b"GET /b ")


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("http://127.0.0.1/", Forbidden),
        ("http://[::1]/", Forbidden),
        ("http://metadata.test/", Forbidden),
        ("http://cdn.test:22/", Forbidden),
        ("file:///etc/passwd", Forbidden),
        ("data:image/png;base64,AAAA", Forbidden),
        ("http://user:password@cdn.test/", BadMedia),
        ("http://cdn.test/\\a b", BadMedia),
        ("http://[", BadMedia),
    ],
)
def test_redirects_are_checked_like_the_first_url(
    internet: Internet, location: str, error: type[Exception]
) -> None:
    internet.add("cdn.test", redirect(location))
    internet.add("metadata.test", ok(b"secret"), address="169.254.169.254")
    internet.names["127.0.0.1"], internet.names["::1"] = [["127.0.0.1"]], [["::1"]]
    with pytest.raises(error):
        get("http://cdn.test/", ("*",))
    assert internet.connected == [(PUBLIC, 80)]


def test_a_redirect_to_a_host_that_is_not_allowed(internet: Internet) -> None:
    internet.add("cdn.test", redirect("http://img.test/"))
    internet.add("img.test", ok(b"there"), address=OTHER_PUBLIC)
    with pytest.raises(Forbidden, match=r"img\.test are not allowed"):
        get("http://cdn.test/")
    assert internet.looked_up == ["cdn.test"]


def test_a_name_that_changes_its_mind_between_redirects(internet: Internet) -> None:
    internet.add("cdn.test", redirect("/again"), [PUBLIC], ["10.0.0.1"])
    with pytest.raises(Forbidden, match="public address"):
        get("http://cdn.test/")
    assert internet.connected == [(PUBLIC, 80)]


@pytest.mark.parametrize("most", [0, 1, 3])
def test_redirects_are_counted(internet: Internet, most: int) -> None:
    host = internet.add("cdn.test", redirect("/"))
    with pytest.raises(MediaUnavailable, match=f"more than {most} times"):
        get("http://cdn.test/", max_redirects=most)
    assert host.num_connections == most + 1


# Sizes


def test_an_announced_length_is_refused_before_the_body(internet: Internet) -> None:
    def announce(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 101\r\n\r\n")
        connection.recv(1)  # no body comes: whoever waits for one runs into the deadline

    internet.add("cdn.test", announce)
    with pytest.raises(BadMedia, match="100 bytes"):
        get("http://cdn.test/", max_media_bytes=100)


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 1000),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"3e8\r\n" + b"x" * 1000 + b"\r\n",
        ),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7fffffff\r\n", b"x" * 1000),
    ],
)
def test_bodies_without_a_length_are_counted(internet: Internet, head: bytes, piece: bytes) -> None:
    def endless(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(head)
        until_closed(connection, piece)

    internet.add("cdn.test", endless)
    with pytest.raises(BadMedia, match="100000 bytes"):
        get("http://cdn.test/", max_media_bytes=100_000)


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 ", b""])
def test_endless_headers(internet: Internet, start: bytes) -> None:
    def endless(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(start)
        until_closed(connection, b"X-Header: " + b"x" * 1000 + b"\r\n")

    internet.add("cdn.test", endless)
    with pytest.raises(MediaUnavailable):
        get("http://cdn.test/")


# Time


def silence(connection: socket.socket) -> None:
    """Read until the client has gone."""
    while connection.recv(4096):
        pass


def drip(head: bytes, piece: bytes) -> Answer:
    def answer(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(head)
        until_closed(connection, piece, pause_s=0.02)

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x"),
        drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        drip(b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        silence,
    ],
)
def test_slow_hosts_meet_the_deadline(internet: Internet, answer: Answer) -> None:
    internet.add("cdn.test", answer)
    with pytest.raises(MediaUnavailable, match=r"within 0\.3 s"):
        get("http://cdn.test/", fetch_timeout_s=0.3)


def test_slow_handshakes_meet_the_deadline(internet: Internet) -> None:
    internet.add("cdn.test", silence)
    with pytest.raises(MediaUnavailable, match=r"within 0\.3 s"):
        get("https://cdn.test/", fetch_timeout_s=0.3)


def test_slow_names_meet_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def wait(*_: object, **__: object) -> list[object]:
        answered.wait()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", wait)
    with pytest.raises(MediaUnavailable, match=r"within 0\.1 s"):
        get("http://cdn.test/", fetch_timeout_s=0.1)
    answered.set()


def test_redirects_share_the_deadline(internet: Internet) -> None:
    def slowly(connection: socket.socket) -> None:
        read_head(connection)
        threading.Event().wait(0.1)
        connection.sendall(redirect("/"))

    host = internet.add("cdn.test", slowly)
    with pytest.raises(MediaUnavailable, match=r"within 0\.3 s"):
        get("http://cdn.test/", fetch_timeout_s=0.3, max_redirects=100)
    assert host.num_connections <= 4


def test_a_deadline_that_has_passed_fetches_nothing(internet: Internet) -> None:
    internet.add("cdn.test", ok(b"late"))
    config = MediaConfig(allowed_media_domains=["cdn.test"])
    with pytest.raises(MediaUnavailable, match="within 0 s"):
        fetch(Remote("http", "cdn.test", 80, "/"), config, Deadline(0))
    assert not internet.connected


# Other answers


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", "status 404"),
        (b"HTTP/1.1 206 Partial\r\nContent-Length: 2\r\n\r\nno", "status 206"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "status 302"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nno", "compresses"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\ncut", "RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nno", "RemoteProtocolError"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
            "RemoteProtocolError",
        ),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nabc\r\n0\r\n\r\n",
            "RemoteProtocolError",
        ),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", "RemoteProtocolError"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "RemoteProtocolError"),
        (b"", "without an answer|RemoteProtocolError"),
    ],
)
def test_answers_that_are_no_media(internet: Internet, answer: bytes, said: str) -> None:
    internet.add("cdn.test", answer)
    with pytest.raises(MediaUnavailable, match=said) as refused:
        get("http://cdn.test/path?secret")
    assert "http://cdn.test" in str(refused.value) and "secret" not in str(refused.value)


def test_hosts_that_are_not_there(internet: Internet) -> None:
    with pytest.raises(MediaUnavailable, match=r"no host 'cdn\.test'"):
        get("http://cdn.test/")
    internet.names["cdn.test"] = [[PUBLIC]]
    with pytest.raises(MediaUnavailable, match="ConnectionRefusedError"):
        get("http://cdn.test/")


def test_a_name_that_the_resolver_cannot_write() -> None:
    with pytest.raises(MediaUnavailable, match="no host"):
        get(f"http://{'a' * 64}.test/", ("*",))


@given(st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", ok(b"abc")[:-3]]), st.binary(max_size=200))
def test_any_answer_is_a_body_or_a_refusal(head: bytes, tail: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(head + tail)
        theirs.shutdown(socket.SHUT_WR)
        source = Remote("http", "cdn.test", 80, "/")
        with contextlib.suppress(RequestError, fetching.h11.ProtocolError):
            answer = fetching._exchange(ours, source, Deadline(10), 100)
            assert isinstance(answer, Remote) or len(answer) <= 100


# TLS


def certificate_for(folder: Path, *names: str) -> Path:
    """A certificate that signs itself, with its key, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loramux test")])
    now = datetime.datetime.now(datetime.UTC)
    alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
    alternatives.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "certificate.pem"
    path.write_bytes(private + signed.public_bytes(pem))
    return path


class TlsHost:
    """An answer over TLS that notes the names clients ask for."""

    def __init__(self, certificate: Path, body: bytes):
        self.names: list[str | None] = []
        self.body = body
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate)
        self.context.sni_callback = lambda _, name, __: self.names.append(name)

    def __call__(self, connection: socket.socket) -> None:
        with self.context.wrap_socket(connection, server_side=True) as encrypted:
            read_head(encrypted)
            encrypted.sendall(ok(self.body))


def test_tls_is_for_the_name_at_the_checked_address(
    internet: Internet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = certificate_for(tmp_path, "cdn.test")
    answer = TlsHost(certificate, b"encrypted")
    internet.add("cdn.test", answer)
    internet.names["other.test"] = [[PUBLIC]]
    with pytest.raises(MediaUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        get("https://cdn.test/")  # nobody vouches for it
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(fetching, "_tls_context", lambda: trusting)
    assert get("https://cdn.test/") == b"encrypted"
    assert internet.connected[-1] == (PUBLIC, 443)
    with pytest.raises(MediaUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        get("https://other.test/", ("*",))
    assert answer.names == ["cdn.test", "cdn.test", "other.test"]


def test_tls_contexts_verify() -> None:
    context = fetching._tls_context()
    assert context.check_hostname and context.verify_mode is ssl.CERT_REQUIRED
