"""Image and sound files for the tests of loramux.media, some made by hand to be broken or huge."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import PIL.Image

PIXEL_BOMB_SIDE = 60_000


def random_pixels(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """uint8 [H, W, C]"""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def random_image(seed: int, width: int = 13, height: int = 7) -> PIL.Image.Image:
    return PIL.Image.fromarray(random_pixels(seed, height, width))


def encoded(image: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def random_png(seed: int, width: int = 13, height: int = 7) -> bytes:
    return encoded(random_image(seed, width, height), "PNG")


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def png_by_hand(width: int, height: int, compressed: bytes, bits: int = 8, color: int = 2) -> bytes:
    """A PNG whose header may claim anything."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", compressed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(name, body) for name, body in chunks)


def _png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def zeros_compressed(num_mebibytes: int) -> bytes:
    """A zlib stream of that many zeros, a thousandth of their size."""
    deflate = zlib.compressobj(9)
    return (
        b"".join(deflate.compress(bytes(1 << 20)) for _ in range(num_mebibytes)) + deflate.flush()
    )


def wav(
    body: bytes,
    *,
    bits: int = 16,
    channels: int = 1,
    rate: int = 16_000,
    code: int = 1,
    extensible: bool = False,
    data_size: int | None = None,
    before: bytes = b"",
) -> bytes:
    """A WAV file; `data_size` may lie, `before` are chunks ahead of the format's."""
    frame = channels * bits // 8
    shown = 0xFFFE if extensible else code
    layout = struct.pack("<HHIIHH", shown, channels, rate, rate * frame, frame, bits)
    if extensible:
        guid_tail = bytes.fromhex("000000001000800000aa00389b71")
        layout += struct.pack("<HHIH", 22, bits, 0, code) + guid_tail
    chunks = before + b"fmt " + struct.pack("<I", len(layout)) + layout
    chunks += b"data" + struct.pack("<I", len(body) if data_size is None else data_size) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks
