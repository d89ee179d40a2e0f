"""Images: every format as PIL itself reads it, and hostile files refused before they cost anything."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.config import MediaConfig
from loramux.errors import BadMedia
from loramux.media.images import FORMATS, MAX_FULL_SCANS, decode_image
from media_files import (
    PIXEL_BOMB_SIDE,
    encoded,
    png_by_hand,
    random_image,
    random_pixels,
    random_png,
    zeros_compressed,
)

CONFIG = MediaConfig()


def pixels(data: bytes, config: MediaConfig = CONFIG) -> np.ndarray:
    """uint8 [H, W, 3]"""
    return np.asarray(decode_image(data, config).pixels)


def refuse_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: PIL.Image.Image) -> None:
        raise AssertionError("decoded")

    for kind in (
        "ImageFile.ImageFile",
        "PngImagePlugin.PngImageFile",
        "WebPImagePlugin.WebPImageFile",
    ):
        monkeypatch.setattr(f"PIL.{kind}.load", load)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "GIF"])
def test_lossless_formats(kind: str) -> None:
    image = random_image(1)
    if kind == "GIF":
        image = image.quantize(64)
    data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    decoded = decode_image(data, CONFIG)
    assert decoded.pixels.mode == "RGB" and type(decoded.pixels) is PIL.Image.Image
    assert decoded.digest == hashlib.sha256(data).hexdigest()
    np.testing.assert_array_equal(np.asarray(decoded.pixels), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"subsampling": 0}), ("WEBP", {})],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_lossy_formats(kind: str, options: dict[str, object], mode: str) -> None:
    image = random_image(2, 50, 40).convert(mode)
    if kind == "WEBP" and mode == "CMYK":
        image = image.convert("RGB")
    data = encoded(image, kind, **options)
    expected = PIL.Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(pixels(data), np.asarray(expected))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_of_animations_the_first_frame(kind: str) -> None:
    frames = [random_image(seed).quantize(16) for seed in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(pixels(data), np.asarray(frames[0].convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(mode: str) -> None:
    layers = random_pixels(3, 6, 9, len(mode))
    data = encoded(PIL.Image.fromarray(layers, mode), "PNG")
    alpha = layers[..., -1:].astype(float) / 255  # [H, W, 1]
    expected = layers[..., :-1] * alpha + 255 * (1 - alpha)  # [H, W, 1 or 3]
    assert np.abs(pixels(data) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_one_transparent_colour(mode: str) -> None:
    image = random_image(4).convert(mode)
    at = (2, 3)
    transparent = image.getpixel(at)
    plain = np.asarray(image.convert("RGB"))
    expected = plain.copy()
    expected[
        np.asarray(image).reshape(*plain.shape[:2], -1)[..., 0] == np.ravel(transparent)[0]
    ] = 255
    if mode == "RGB":
        expected = plain.copy()
        expected[(plain == transparent).all(axis=-1)] = 255
    if mode == "1":
        transparent = 1 if transparent else 0
    np.testing.assert_array_equal(pixels(encoded(image, "PNG", transparency=transparent)), expected)


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_gray_palette_and_bits(mode: str) -> None:
    image = random_image(5).convert(mode)
    np.testing.assert_array_equal(pixels(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


def test_16_bit_gray_is_its_high_bytes() -> None:
    values = np.random.default_rng(6).integers(0, 1 << 16, (5, 8), dtype=np.uint16)
    data = encoded(PIL.Image.fromarray(values), "PNG")
    np.testing.assert_array_equal(pixels(data), np.stack([values >> 8] * 3, axis=-1))


def test_16_bit_gray_with_a_transparent_value() -> None:
    values = np.array([[0x1234, 0x1235, 0xFF00]], ">u2")
    whole = png_by_hand(3, 1, zlib.compress(b"\0" + values.tobytes()), bits=16, color=0)
    body = b"tRNS" + struct.pack(">H", 0x1234)
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    before_data = whole.index(b"IDAT") - 4
    data = whole[:before_data] + chunk + whole[before_data:]
    np.testing.assert_array_equal(pixels(data)[0, :, 0], [255, 0x12, 0xFF])


def test_16_bit_colours_are_their_high_bytes() -> None:
    values = np.random.default_rng(7).integers(0, 1 << 16, (4, 5, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = png_by_hand(5, 4, zlib.compress(rows), bits=16)
    np.testing.assert_array_equal(pixels(data), values >> 8)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_are_turned_once_as_exif_says(kind: str, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encoded(random_image(8, 24, 16), kind, exif=exif)
    expected = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
    decoded = decode_image(data, CONFIG).pixels
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(expected))
    again = PIL.ImageOps.exif_transpose(decoded)  # what transformers does on loading
    np.testing.assert_array_equal(np.asarray(again), np.asarray(decoded))


def test_equal_bytes_make_equal_images() -> None:
    data = random_png(9)
    assert decode_image(data, CONFIG) == decode_image(data, CONFIG)
    assert decode_image(data, CONFIG) != decode_image(random_png(10), CONFIG)


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "TGA", "JPEG2000", "PCX"])
def test_other_formats_are_refused_with_the_list(kind: str) -> None:
    with pytest.raises(BadMedia, match=", ".join(FORMATS)):
        pixels(encoded(random_image(11, 32, 32), kind))


def test_text_and_nothing() -> None:
    with pytest.raises(BadMedia, match="empty"):
        pixels(b"")
    for data in (b"a", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        with pytest.raises(BadMedia, match="no format"):
            pixels(data)


@pytest.mark.parametrize("side", [PIXEL_BOMB_SIDE, 9_000, 12_000, (1 << 31) - 1])
def test_a_header_that_claims_too_much_is_not_decoded(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_decoding(monkeypatch)
    with pytest.raises(BadMedia, match="pixels") as refused:
        pixels(png_by_hand(side, side, zlib.compress(b"")))
    assert str(CONFIG.max_image_pixels) in str(refused.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_pixels_are_counted_on_the_header(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(random_image(12, 20, 10), kind)
    assert pixels(data, MediaConfig(max_image_pixels=200)).shape == (10, 20, 3)
    assert decode_image(data, CONFIG, max_pixels=200).pixels.size == (20, 10)
    refuse_decoding(monkeypatch)
    with pytest.raises(BadMedia, match="20 x 10 where 199 are allowed"):
        pixels(data, MediaConfig(max_image_pixels=199))
    with pytest.raises(BadMedia, match="20 x 10 where 199 are allowed"):
        decode_image(data, CONFIG, max_pixels=199)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_no_pixels(size: tuple[int, int]) -> None:
    with pytest.raises(BadMedia):
        pixels(png_by_hand(*size, zlib.compress(b"")))


def test_a_zip_bomb_is_inflated_no_further_than_its_pixels() -> None:
    import tracemalloc

    data = png_by_hand(10, 10, zeros_compressed(512))
    assert len(data) < 1 << 20
    tracemalloc.start()
    try:
        assert not pixels(data).any()
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP"])
def test_a_zip_bomb_in_a_comment_is_refused_or_left_alone(name: bytes) -> None:
    import tracemalloc

    body = name + b"profile\0\0" + zeros_compressed(256)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = random_png(13)
    data = data[:33] + chunk + data[33:]  # after the header
    tracemalloc.start()
    try:
        with pytest.raises(BadMedia):
            pixels(data)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_jpegs_of_very_many_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(random_image(14, 64, 64), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    bomb = data[:-2] + 500 * data[start:-2] + data[-2:]
    assert pixels(bomb).shape == (64, 64, 3)  # small enough to be harmless
    scans = bomb.count(b"\xff\xda")
    enough = -(-scans * 64 * 64 // MAX_FULL_SCANS)
    assert pixels(bomb, MediaConfig(max_image_pixels=enough)).shape == (64, 64, 3)
    refuse_decoding(monkeypatch)
    with pytest.raises(BadMedia, match=f"{scans} scans"):
        pixels(bomb, MediaConfig(max_image_pixels=enough - 1))


def test_run_length_bmp_is_refused() -> None:
    rows = b"\x04\x01\x00\x00" * 4 + b"\x00\x01"
    palette = bytes(4 * 256)
    info = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 8, 1, len(rows), 0, 0, 256, 0)
    start = 14 + len(info) + len(palette)
    data = b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + info + palette + rows
    assert PIL.Image.open(io.BytesIO(data)).convert("RGB").size == (4, 4)
    with pytest.raises(BadMedia, match="run-length"):
        pixels(data)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files(kind: str, share: float) -> None:
    data = encoded(random_image(15, 64, 64), kind)
    with pytest.raises(BadMedia) as refused:
        pixels(data[: int(share * len(data))])
    assert " at 0x" not in str(refused.value)


def test_bytes_are_counted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_png(16)
    assert pixels(data, MediaConfig(max_media_bytes=len(data))).any()
    monkeypatch.setattr(PIL.Image, "open", None)
    with pytest.raises(BadMedia, match=f"{len(data)} bytes"):
        pixels(data, MediaConfig(max_media_bytes=len(data) - 1))


SMALL = MediaConfig(max_image_pixels=10_000)
VALID = [
    *(encoded(random_image(17), kind) for kind in FORMATS),
    encoded(random_image(17).convert("P"), "PNG", transparency=3),
    encoded(
        random_image(17), "JPEG", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"
    ),
    encoded(random_image(17).quantize(), "GIF", save_all=True, append_images=[random_image(18)]),
    encoded(random_image(17), "WEBP", save_all=True, append_images=[random_image(18)]),
]


def image_or_refusal(data: bytes) -> None:
    try:
        decoded = decode_image(data, SMALL)
    except BadMedia as error:
        assert "\n" not in str(error)
    else:
        width, height = decoded.pixels.size
        assert decoded.pixels.mode == "RGB" and 1 <= width * height <= 10_000


@given(st.sampled_from([b"", *(data[:30] for data in VALID)]), st.binary(max_size=200))
def test_random_bytes_are_an_image_or_a_refusal(head: bytes, tail: bytes) -> None:
    image_or_refusal(head + tail)


@settings(max_examples=400)
@given(st.data())
def test_damaged_files_are_an_image_or_a_refusal(draw: st.DataObject) -> None:
    data = bytearray(draw.draw(st.sampled_from(VALID)))
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(data) - 1))
        width = draw.draw(st.integers(0, 4))
        data[at : at + width] = draw.draw(st.binary(max_size=4))
    image_or_refusal(bytes(data))
