"""What media are once decoded, and the one way in which decoders refuse."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from loramux.config import MediaConfig
from loramux.errors import BadMedia, LoramuxError


@dataclass(frozen=True, slots=True)
class Image:
    """RGB pixels, upright, over white. A PIL image and no array: of an array [3, W, 3] a processor
    cannot tell the channels from the rows, and those without torchvision make PIL images anyway.

    `digest` is the hex sha256 of the bytes as they came, before decoding. Images are equal when their
    digests are; so are sounds and videos.
    """

    pixels: PIL.Image.Image = field(repr=False, compare=False)
    digest: str


@dataclass(frozen=True, slots=True)
class Audio:
    """Mono samples, float32 [S], mostly within -1..1, `rate` a second. `digest` as an image's."""

    samples: NDArray[np.float32] = field(repr=False, compare=False)
    rate: int
    digest: str

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


@dataclass(frozen=True, slots=True)
class Video:
    """RGB frames of one size in their order. `digest` is the hex sha256 of the frames' digests."""

    frames: tuple[PIL.Image.Image, ...] = field(repr=False, compare=False)
    digest: str


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_size(data: bytes, config: MediaConfig) -> None:
    """Raise BadMedia for no bytes, or too many."""
    if not data:
        raise BadMedia("the media are empty")
    if len(data) > config.max_media_bytes:
        raise BadMedia(
            f"the media have {len(data)} bytes, and {config.max_media_bytes} are allowed",
            remedy="send less, or have the operator raise max_media_bytes",
        )


@contextmanager
def broken_is_refused(what: str) -> Iterator[None]:
    """Turn whatever a decoder raises on a stranger's bytes into BadMedia.

    Every exception, since decoders raise nearly every kind on hostile files (struct.error, IndexError,
    AssertionError, MemoryError, ...) and none of them may end anything but this request.
    """
    try:
        yield
    except LoramuxError:
        raise
    except Exception as error:
        # Without addresses in our memory, as in <_io.BytesIO object at 0x7f...>.
        text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the data", str(error))
        reason = " ".join(text.split())[:120] or type(error).__name__
        raise BadMedia(
            f"{what} is broken or truncated: {reason}", remedy="check that it opens elsewhere"
        ) from error
