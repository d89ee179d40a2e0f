"""Bytes of an image file to upright RGB pixels; sizes are checked on the header, before decoding."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
from PIL.Image import Transpose

from loramux.config import MediaConfig
from loramux.errors import BadMedia
from loramux.media.decoded import Image, broken_is_refused, check_size, digest_of

# What cameras, browsers and drawing programs write. Each further decoder is one more to be attacked.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

# A progressive JPEG goes over all its pixels once a scan, and files with thousands of scans can be made.
# Usual ones have about 10; so many of the largest image allowed may be decoded.
MAX_FULL_SCANS = 16
_START_OF_SCAN = b"\xff\xda"

_BMP_RUN_LENGTHS = (1, 2)  # compressions that Pillow undoes run by run in Python

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def decode_image(data: bytes, config: MediaConfig, *, max_pixels: int | None = None) -> Image:
    """The image in `data`: the first frame of an animation, turned as EXIF says, alpha over white,
    16-bit gray as its high bytes. Embedded colour profiles are not applied.

    `max_pixels` is a bound besides `config.max_image_pixels`. Raises BadMedia.
    """
    check_size(data, config)
    limit = min(config.max_image_pixels, max_pixels or config.max_image_pixels)
    with broken_is_refused("the image"), _opened(data, limit) as opened:
        _check_header(opened, data, limit)
        opened.load()
        turn = _UPRIGHT.get(opened.getexif().get(_ORIENTATION_TAG, 1))
        pixels = as_rgb(opened)
        if turn is not None:
            pixels = pixels.transpose(turn)
        pixels.info.clear()  # or whoever looks for an orientation there turns it once more
        return Image(pixels, digest_of(data))


def _opened(data: bytes, limit: int) -> PIL.Image.Image:
    """The file with its header read."""
    try:
        return PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except PIL.UnidentifiedImageError:
        raise BadMedia(
            f"the image is in no format that is read ({', '.join(FORMATS)}), or its header is broken",
            remedy="send it as PNG or JPEG",
        ) from None
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise _too_many_pixels("its header claims more", limit) from None


def _check_header(opened: PIL.Image.Image, data: bytes, limit: int) -> None:
    """Raise BadMedia for what would be too much work or memory to decode."""
    width, height = opened.size
    num_pixels = width * height
    if num_pixels < 1:
        raise BadMedia(f"the image has {width} x {height} pixels")
    if num_pixels > limit:
        raise _too_many_pixels(f"{width} x {height}", limit)
    if opened.format in ("JPEG", "MPO"):
        num_scans = data.count(_START_OF_SCAN)
        if num_scans * num_pixels > MAX_FULL_SCANS * limit:
            raise BadMedia(
                f"the JPEG goes over its {width} x {height} pixels in {num_scans} scans",
                remedy="save it anew as a baseline JPEG",
            )
    if opened.format == "BMP" and opened.info.get("compression") in _BMP_RUN_LENGTHS:
        raise BadMedia("BMP files with run-length coding are not read", remedy="send it as PNG")


def as_rgb(opened: PIL.Image.Image) -> PIL.Image.Image:
    """A copy in RGB that needs no file."""
    if opened.mode.startswith("I;16") or opened.mode == "I":
        return _from_16_bit(opened)
    if not opened.has_transparency_data:
        return opened.convert("RGB")
    layered = opened.convert("RGBA")
    white = PIL.Image.new("RGBA", layered.size, "white")
    white.alpha_composite(layered)
    return white.convert("RGB")


def _from_16_bit(opened: PIL.Image.Image) -> PIL.Image.Image:
    """Gray of 16 bits as its high bytes, as Pillow does with colours; its own conversion would clip."""
    values = np.asarray(opened)  # [H, W]
    gray = (values >> 8).astype(np.uint8)  # [H, W]
    transparent = opened.info.get("transparency")
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return PIL.Image.fromarray(gray).convert("RGB")


def _too_many_pixels(claimed: str, limit: int) -> BadMedia:
    return BadMedia(
        f"the image has too many pixels: {claimed} where {limit} are allowed",
        remedy="send a smaller one; models shrink images anyway",
    )
