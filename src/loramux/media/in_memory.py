"""Images, sounds and videos that a program of this process has decoded already.

Their pixels and samples are taken as they are: no EXIF tag turns them, and of the limits of a
MediaConfig only the number of items counts.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import PIL.Image

from loramux.errors import InvalidField
from loramux.media.decoded import Audio, Image, Video, broken_is_refused, digest_of
from loramux.media.images import as_rgb


def image_in_memory(pixels: Any) -> Image:
    """Of a PIL image, or an array uint8 [H, W, 3]. Raises InvalidField for anything else."""
    if isinstance(pixels, Image):
        return pixels
    if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 3:
        pixels = PIL.Image.fromarray(pixels) if pixels.shape[-1] == 3 else pixels
    if not isinstance(pixels, PIL.Image.Image):
        raise InvalidField(
            f"an image is a PIL image or an array uint8 [H, W, 3], not {_kind(pixels)}"
        )
    with broken_is_refused("the image"):  # one that was opened and not read yet
        image = as_rgb(pixels)
    image.info.clear()  # or a processor that looks for an orientation there would turn it
    return Image(image, _digest("image", image.size, image.tobytes()))


def audio_in_memory(sound: Any) -> Audio:
    """Of (samples, rate): floating-point samples [S] of one channel, mostly within -1..1, and their
    number a second. Raises InvalidField for anything else."""
    if isinstance(sound, Audio):
        return sound
    if not isinstance(sound, (tuple, list)) or len(sound) != 2:
        raise InvalidField(f"a sound is a pair of samples and their rate, not {_kind(sound)}")
    samples, rate = np.asarray(sound[0]), sound[1]  # [S]
    if samples.dtype.kind != "f" or samples.ndim != 1 or not samples.size:
        raise InvalidField(
            f"the samples of a sound are floating-point numbers [S], not {_kind(samples)}",
            remedy="average channels, and divide integers by their largest value",
        )
    if not np.isfinite(samples).all():
        raise InvalidField("the sound holds samples that are no finite numbers")
    if not isinstance(rate, (int, float, np.number)) or int(rate) != rate or rate < 1:
        raise InvalidField(
            f"the rate of a sound is a whole number of samples a second, not {rate!r}"
        )
    samples = np.ascontiguousarray(samples, np.float32)  # [S]
    return Audio(samples, int(rate), _digest("audio", int(rate), samples.tobytes()))


def video_in_memory(frames: Any) -> Video:
    """Of frames as images are given, or an array uint8 [F, H, W, 3]. Raises InvalidField for anything
    else, and for frames of several sizes."""
    if isinstance(frames, Video):
        return frames
    images = [image_in_memory(frame) for frame in frames]
    sizes = {image.pixels.size for image in images}
    if len(sizes) != 1:
        raise InvalidField(f"the frames of a video have one size, not {len(sizes)}")
    digest = digest_of("".join(image.digest for image in images).encode())
    return Video(tuple(image.pixels for image in images), digest)


def _digest(*parts: Any) -> str:
    """Of the content, and of what the same bytes could otherwise be."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part if isinstance(part, bytes) else f"{part} ".encode())
    return sha.hexdigest()


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array {value.dtype} {list(value.shape)}"
    return type(value).__name__
