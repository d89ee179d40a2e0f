"""References as text: each kind is told apart, and what is malformed is refused."""

from __future__ import annotations

import base64
import random
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.errors import BadMedia, Forbidden, RequestError
from loramux.media import (
    Inline,
    LocalFile,
    Remote,
    inline_base64,
    parse_frames,
    parse_reference,
)
from loramux.media.sources import MAX_REFERENCE_LENGTH, redirected
from media_files import data_url

MAX_BYTES = 1000


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("https://a.test/x.png", Remote("https", "a.test", 443, "/x.png")),
        ("HTTP://A.Test:8080", Remote("http", "a.test", 8080, "/")),
        ("https://a.test./x?q=%41&r=b/c#part", Remote("https", "a.test", 443, "/x?q=%41&r=b/c")),
        ("https://a.test/ä?ö", Remote("https", "a.test", 443, "/%C3%A4?%C3%B6")),
        ("http://[2606:4700:0::1]:81/x", Remote("http", "2606:4700::1", 81, "/x")),
        ("file:///folder/a%20b.png", LocalFile("/folder/a b.png")),
        ("file://localhost/a.png", LocalFile("/a.png")),
        ("/folder/a.png", LocalFile("/folder/a.png")),
        ("a b/ä.png", LocalFile("a b/ä.png")),
    ],
)
def test_urls_and_paths(text: str, source: Remote | LocalFile) -> None:
    assert parse_reference(text, MAX_BYTES) == source


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "characters"),
        ("/" + "a" * MAX_REFERENCE_LENGTH, "characters"),
        ("https://a.test/" + "a" * MAX_REFERENCE_LENGTH, "characters"),
        ("/a\0b", "control"),
        ("/a\nb", "control"),
        ("/a\ud800b", "surrogates"),
        ("https://a.test/\udcff", "surrogates"),
        ("ftp://a.test/a", "'ftp'"),
        ("gopher://a.test/a", "'gopher'"),
        ("javascript:alert(1)", "'javascript'"),
        ("s3://bucket/key", "'s3'"),
        ("https://user:secret@a.test/", "password"),
        ("https://user@a.test/", "password"),
        ("https://allowed.test\\@a.test/", "backslashes"),
        ("https://a.test/a b", "spaces"),
        ("https://", "host"),
        ("https:/a.test/x", "host"),
        ("https:a.test", "host"),
        ("https://ä.test/", "xn--"),
        ("https://a%2etest/", "host"),
        ("https://a..test/", "host"),
        ("https://a,b.test/", "host"),
        ("https://" + "a." * 130 + "test/", "host"),
        ("https://a.test:0/", "malformed"),
        ("https://a.test:99999/", "malformed"),
        ("https://a.test:x/", "malformed"),
        ("https://[::1", "malformed"),
        ("https://[fe80::1%25eth0]/", "malformed"),
        ("file://other.test/a", "another host"),
        ("file:a.png", "relative"),
        ("file:///a%00b", "control"),
        ("file:///a%ff", "malformed"),
        ("file:///a?b", "query"),
        ("file:///a#b", "query"),
        ("data:image/png;base64", "comma"),
        ("data:" + "x" * 1000 + ",AAAA", "comma"),
        ("data:image/png;base64,A*==", "base64"),
        ("data:image/png;base64,AAAA,AAAA", "base64"),
        ("data:image/png;base64,A", "base64"),
        ("data:image/png;base64,AA=A", "base64"),
        ("data:image/png;base64,ä", "base64"),
        ("data:image/png,ä", "percent-encoded"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(BadMedia, match=said) as refused:
        parse_reference(text, MAX_BYTES)
    assert "secret" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("size", [0, 1, 2, 3, MAX_BYTES - 1, MAX_BYTES])
def test_data_urls(size: int) -> None:
    data = random.Random(size).randbytes(size)
    text = base64.b64encode(data).decode()
    wrapped = "\r\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    for reference in (
        data_url(data),
        f"DATA:Image/PNG;charset=x;BASE64,{text.rstrip('=')}",
        f"data:image/png;base64,{quote(text, safe='')}",
        f"data:image/png;base64,{wrapped}",
        f"data:image/png,{quote(data)}",
    ):
        assert parse_reference(reference, MAX_BYTES) == Inline(data, "image/png")
    assert inline_base64(text, MAX_BYTES) == Inline(data, "")
    assert parse_reference(f"data:,{quote(data)}", MAX_BYTES) == Inline(data, "")


@pytest.mark.parametrize("size", [MAX_BYTES + 1, MAX_BYTES + 2, MAX_BYTES + 3, 50 * MAX_BYTES])
def test_data_that_is_too_large(size: int) -> None:
    data = random.Random(size).randbytes(size)
    text = base64.b64encode(data).decode()
    for reference in (data_url(data), f"data:image/png,{quote(data)}", data_url(data).rstrip("=")):
        with pytest.raises(BadMedia, match=f"{MAX_BYTES} bytes"):
            parse_reference(reference, MAX_BYTES)
    with pytest.raises(BadMedia, match=f"{MAX_BYTES} bytes"):
        inline_base64(text, MAX_BYTES)


def test_a_huge_base64_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object, **__: object) -> bytes:
        raise AssertionError("decoded")

    monkeypatch.setattr(base64, "b64decode", decode)
    with pytest.raises(BadMedia, match="32 bytes"):
        parse_reference("data:image/png;base64," + "A" * (64 << 20), 32)


def test_a_value_does_not_show_its_secrets() -> None:
    remote = parse_reference("https://a.test/x?signature=secret", MAX_BYTES)
    assert "secret" not in repr(remote)
    assert "AAAA" not in repr(inline_base64("AAAA", MAX_BYTES))


def test_frames() -> None:
    frames = [random.Random(seed).randbytes(10 + seed) for seed in range(4)]
    text = ",".join(base64.b64encode(frame).decode() for frame in frames)
    found = parse_frames(f"data:video/jpeg;base64,{text}", MAX_BYTES, 4)
    assert found == [Inline(frame, "image/jpeg") for frame in frames]
    with pytest.raises(BadMedia, match="4 frames, and 1 to 3"):
        parse_frames(f"data:video/jpeg;base64,{text}", MAX_BYTES, 3)
    total = sum(map(len, frames))
    assert len(parse_frames(f"data:video/jpeg;base64,{text}", total, 4)) == 4
    with pytest.raises(BadMedia, match=f"{total - 1} bytes"):
        parse_frames(f"data:video/jpeg;base64,{text}", total - 1, 4)
    with pytest.raises(BadMedia, match="16000001 frames"):
        parse_frames("data:video/jpeg;base64," + "," * 16_000_000, MAX_BYTES, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data:video/mp4;base64,AAAA", "video/mp4"),
        ("data:image/gif;base64,AAAA", "image/gif"),
        ("https://a.test/film.mp4", "URL"),
        ("/film.mp4", "path"),
    ],
)
def test_containers_are_refused_by_name_with_the_remedy(text: str, said: str) -> None:
    with pytest.raises(BadMedia, match=said) as refused:
        parse_frames(text, MAX_BYTES, 4)
    assert "MP4" in refused.value.message
    assert "data:video/jpeg" in (refused.value.remedy or "")


def test_redirects() -> None:
    here = Remote("https", "a.test", 8443, "/x/y?z")
    assert redirected(here, "../w?v") == Remote("https", "a.test", 8443, "/w?v")
    assert redirected(here, "//b.test/w") == Remote("https", "b.test", 443, "/w")
    assert redirected(here, "http://b.test:80") == Remote("http", "b.test", 80, "/")
    for location in ("file:///etc/passwd", "data:image/png;base64,AAAA", "ftp://b.test/"):
        with pytest.raises(Forbidden, match=r"https://a\.test:8443"):
            redirected(here, location)
    for location in ("https://u:p@b.test/", "https://[x/", "", "/a b", "/\udcff", "/" * 9000):
        with pytest.raises(BadMedia):
            redirected(here, location)


SCHEMES = st.sampled_from(
    ["", "http:", "https://", "data:", "data:image/png;base64,", "file://", "/"]
)


@given(SCHEMES, st.text(max_size=60))
def test_any_text_is_a_source_or_a_refusal(scheme: str, text: str) -> None:
    for parse in (
        lambda: parse_reference(scheme + text, MAX_BYTES),
        lambda: parse_frames(scheme + text, MAX_BYTES, 4),
        lambda: inline_base64(text, MAX_BYTES),
        lambda: redirected(Remote("https", "a.test", 443, "/x"), scheme + text),
    ):
        try:
            parse()
        except RequestError as error:
            assert "\n" not in str(error)
