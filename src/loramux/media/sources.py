"""References to media, as clients write them, made into values: what is in the text, and nothing read.

    data:image/png;base64,...    Inline        https://host/a.png    Remote
    data:image/png,%89PNG...     Inline        file:///folder/a.png  LocalFile
    bare base64 (inline_base64)  Inline        /folder/a.png, a.png  LocalFile

Bare base64 has a function of its own, since JPEGs begin with `/9j/`, which is a path as well. Nothing
here is allowed yet: whether a host or a folder may be read, `fetching` and `files` decide.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from dataclasses import dataclass, field
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit

from loramux.errors import BadMedia, Forbidden

MAX_REFERENCE_LENGTH = 8192
MAX_TYPE_LENGTH = 256
DEFAULT_PORTS = {"http": 80, "https": 443}

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_UNSAFE = re.compile(r"[\x00-\x20\x7f\\]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_HOST = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))
_SPACES = str.maketrans("", "", " \t\r\n")


@dataclass(frozen=True, slots=True)
class Inline:
    """Bytes that came with the request; `media_type` as the data URL says, lower case, or empty."""

    data: bytes = field(repr=False)
    media_type: str = ""


@dataclass(frozen=True, slots=True)
class Remote:
    """An http or https URL, taken apart. `host` is lower case ASCII or an IPv6 address without brackets;
    `target` is path and query, and may hold secrets, so it is in no message."""

    scheme: str
    host: str
    port: int
    target: str = field(repr=False)

    @property
    def authority(self) -> str:
        """Host and, where it is not the scheme's own, port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.authority}"


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A path on the server's machine, absolute or relative to an allowed root."""

    path: str


Source = Inline | Remote | LocalFile


def parse_reference(text: str, max_bytes: int) -> Source:
    """What a URL or a path refers to; inline data of up to `max_bytes`. Raises BadMedia."""
    scheme = _scheme_of(text)
    if scheme == "data":
        media_type, payloads = _data_url(text, max_bytes)
        return Inline(b"".join(payloads), media_type)
    _check_text(text)
    if scheme is None:
        return _local_file(text)
    if scheme == "file":
        return _file_url(text)
    if scheme in DEFAULT_PORTS:
        return _remote(text)
    raise BadMedia(
        f"URLs of the scheme {scheme[:40]!r} are not read",
        remedy="use a data:, https: or http: URL, a file: URL or a path",
    )


def parse_frames(text: str, max_bytes: int, max_frames: int) -> list[Inline]:
    """The frames of `data:video/jpeg;base64,FRAME,FRAME,...`, at most `max_bytes` in all.

    Raises BadMedia for any other text.
    """
    if re.match(r"data:video/jpeg[;,]", text, re.IGNORECASE):
        _, frames = _data_url(text, max_bytes, max_frames)
        return [Inline(frame, "image/jpeg") for frame in frames]
    shown = repr(text.partition(",")[0][:80]) if _scheme_of(text) == "data" else "a URL or path"
    raise BadMedia(
        f"a video was given as {shown}: containers like MP4, WebM and GIF are not decoded here",
        remedy="send the frames: a list of images, or data:video/jpeg;base64, followed by one base64 "
        "JPEG a frame, divided by commas",
    )


def inline_base64(text: str, max_bytes: int, media_type: str = "") -> Inline:
    """The bytes of bare base64 without a `data:` prefix, at most `max_bytes`. Raises BadMedia."""
    return Inline(_base64(text, max_bytes, max_bytes), media_type)


def redirected(source: Remote, location: str) -> Remote:
    """Where `source` redirects to; Forbidden unless it is http or https again, BadMedia if malformed."""
    _check_text(location)
    try:
        joined = urljoin(source.origin + source.target, location)
    except ValueError:
        raise _malformed() from None
    if _scheme_of(joined) not in DEFAULT_PORTS:
        raise Forbidden(f"{source.origin} redirects to something that is not http or https")
    return _remote(joined)


def _scheme_of(text: str) -> str | None:
    match = _SCHEME.match(text)
    return match[1].lower() if match else None


def _check_text(text: str) -> None:
    if not text or len(text) > MAX_REFERENCE_LENGTH:
        raise BadMedia(
            f"a media URL or path has 1 to {MAX_REFERENCE_LENGTH} characters, and this one {len(text)}",
            remedy="send larger data as a data: URL, with its type in front: data:image/png;base64,...",
        )
    if _CONTROL.search(text) or any("\ud800" <= char <= "\udfff" for char in text):
        raise BadMedia("a media URL or path holds control characters or lone surrogates")


def _data_url(text: str, max_bytes: int, max_frames: int | None = None) -> tuple[str, list[bytes]]:
    """Media type and bytes of a data URL; with `max_frames`, the bytes of each piece between commas."""
    comma = text.find(",", 0, len("data:") + MAX_TYPE_LENGTH)
    if comma < 0:
        raise BadMedia(
            "a data: URL has no comma after its type", remedy="data:image/png;base64,..."
        )
    media_type, *parameters = (part.strip().lower() for part in text[5:comma].split(";"))
    payload = text[comma + 1 :]
    if parameters[-1:] != ["base64"]:
        _check_length(len(payload), 3 * max_bytes, max_bytes)
        if not payload.isascii():
            raise BadMedia("a data: URL holds characters that are not percent-encoded")
        data = unquote_to_bytes(payload)
        _check_length(len(data), max_bytes, max_bytes)
        return media_type, [data]
    if "%" in payload:
        payload = unquote(payload)
    if max_frames is None:
        return media_type, [_base64(payload, max_bytes, max_bytes)]
    num_frames = payload.count(",") + 1
    if num_frames > max_frames:
        raise BadMedia(f"the video has {num_frames} frames, and 1 to {max_frames} are read")
    frames: list[bytes] = []
    for piece in payload.split(","):
        frames.append(_base64(piece, max_bytes - sum(map(len, frames)), max_bytes))
    return media_type, frames


def _base64(text: str, left: int, max_bytes: int) -> bytes:
    """At most `left` of `max_bytes` from base64; padding may be missing, white space is skipped."""
    if any(space in text for space in " \t\r\n"):
        text = text.translate(_SPACES)
    _check_length(len(text) // 4 * 3 - 2, left, max_bytes)
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise BadMedia(
            "the data is not valid base64", remedy="use the standard alphabet (A-Z a-z 0-9 + /)"
        ) from None
    _check_length(len(data), left, max_bytes)
    return data


def _check_length(length: int, limit: int, max_bytes: int) -> None:
    if length > limit:
        raise BadMedia(
            f"the media are larger than the {max_bytes} bytes allowed", remedy="send less"
        )


def _local_file(path: str) -> LocalFile:
    if not path or _CONTROL.search(path):
        raise BadMedia("a media path is empty or holds control characters")
    return LocalFile(path)


def _file_url(text: str) -> LocalFile:
    try:
        parts = urlsplit(text)
        path = unquote(parts.path, errors="strict")
    except ValueError:
        raise _malformed() from None
    if parts.netloc.lower() not in ("", "localhost") or not path.startswith("/"):
        raise BadMedia(
            "a file: URL names another host or a relative path", remedy="file:///folder/a"
        )
    if parts.query or parts.fragment:
        raise BadMedia("a file: URL has a query or fragment", remedy="write ? as %3F and # as %23")
    return _local_file(path)


def _remote(text: str) -> Remote:
    if _UNSAFE.search(text):
        raise BadMedia("a URL holds spaces, backslashes or controls", remedy="percent-encode them")
    try:
        parts = urlsplit(text)
        host, port = (parts.hostname or "").removesuffix("."), parts.port
    except ValueError:
        raise _malformed() from None
    if "@" in parts.netloc:
        raise BadMedia("a media URL holds a user name or password", remedy="leave them out")
    scheme = parts.scheme.lower()
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if port == 0:
        raise _malformed()
    return Remote(
        scheme, _host(host), port or DEFAULT_PORTS[scheme], quote(target, safe=_PRINTABLE)
    )


def _host(host: str) -> str:
    if ":" in host:
        try:
            address = ipaddress.IPv6Address(host)
        except ValueError:
            raise _malformed() from None
        if address.scope_id:
            raise _malformed()
        return str(address)
    if len(host) > 253 or not _HOST.fullmatch(host):
        raise BadMedia(
            "a URL has no host, or one that is no ASCII name",
            remedy="write other alphabets as xn-- (punycode)",
        )
    return host


def _malformed() -> BadMedia:
    return BadMedia("the media URL is malformed")
