"""From a reference in a request to decoded media, or to a refusal that names the field."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from loramux.config import MediaConfig
from loramux.config.media import Modality
from loramux.content import MediaPart
from loramux.errors import BadMedia, InvalidField, RequestError
from loramux.media.decoded import Audio, Image, Video
from loramux.media.fetching import Deadline, fetch
from loramux.media.files import read_file
from loramux.media.images import decode_image
from loramux.media.in_memory import image_in_memory
from loramux.media.sounds import decode_audio
from loramux.media.sources import (
    Inline,
    LocalFile,
    Remote,
    Source,
    inline_base64,
    parse_frames,
    parse_reference,
)


class MediaLoader:
    """Loads media within the limits of one MediaConfig; may be used from several threads at once.

    Each method blocks (network, files, decoding) and raises a RequestError whose `field` is the one
    given: BadMedia for what cannot be decoded or is too large, MediaUnavailable for what could not be
    had, Forbidden for hosts and files that are not allowed.
    """

    def __init__(self, config: MediaConfig):
        self.config = config

    def check_counts(self, counts: Mapping[Modality, int], *, field: str | None = None) -> None:
        """Raise InvalidField if a request has too many items of any modality, naming all of these.

        To be asked before the first item is loaded.
        """
        most = self.config.max_items_per_request
        over = [
            f"{count} of {modality} where {most[modality]} are allowed"
            for modality, count in counts.items()
            if count > most[modality]
        ]
        if over:
            raise InvalidField(
                f"the request has too many media: {', '.join(over)}",
                field=field,
                remedy="send fewer, or have the operator raise max_items_per_request",
            )

    def part(self, part: MediaPart) -> Image | Audio | Video:
        """What a content part of a chat message refers to; refusals name `part.where`."""
        match part.kind:
            case "image_url":
                return self.image(part.value, field=part.where)
            case "audio_url":
                return self.audio(part.value, field=part.where)
            case "video_url":
                return self.video(part.value, field=part.where)
            case "image_pil":
                with named(part.where):
                    return image_in_memory(part.value)
        with named(part.where):
            media_type = f"audio/{part.format.lower()}"
            source = inline_base64(part.value, self.config.max_media_bytes, media_type)
        return self.audio(source, field=part.where)

    def image(self, reference: str | Source, *, field: str | None = None) -> Image:
        """The image that a URL, a path or a parsed source refers to."""
        with named(field):
            return decode_image(self._read(reference, "image"), self.config)

    def audio(self, reference: str | Source, *, field: str | None = None) -> Audio:
        """The sound that a URL, a path or a parsed source refers to."""
        with named(field):
            return decode_audio(self._read(reference, "audio"), self.config)

    def video(self, frames: str | Sequence[str | Source], *, field: str | None = None) -> Video:
        """The video of these images in their order, or of `data:video/jpeg;base64,FRAME,FRAME,...`.

        All frames have one size. They share the deadline and the bytes of one piece of media.
        """
        with named(field):
            if isinstance(frames, str):
                limits = self.config.max_media_bytes, self.config.max_video_frames
                frames = parse_frames(frames, *limits)
            self._check_frame_count(len(frames))
            return self._decode_frames(frames, field)

    def _check_frame_count(self, num_frames: int) -> None:
        if not 1 <= num_frames <= self.config.max_video_frames:
            raise BadMedia(
                f"the video has {num_frames} frames, and 1 to {self.config.max_video_frames} are read",
                remedy="leave some out, or have the operator raise max_video_frames",
            )

    def _decode_frames(self, frames: Sequence[str | Source], field: str | None) -> Video:
        deadline = Deadline(self.config.fetch_timeout_s)
        images: list[Image] = []
        bytes_left, pixels_left = self.config.max_media_bytes, self.config.max_video_pixels
        for position, frame in enumerate(frames):
            with named(f"{field or 'frames'}.{position}"):
                data = self._read(frame, "image", deadline)
                bytes_left -= len(data)
                if bytes_left < 0 or pixels_left < 1:
                    raise self._too_many_frames()
                image = decode_image(data, self.config, max_pixels=pixels_left)
                width, height = image.pixels.size
                pixels_left -= width * height
                if images and image.pixels.size != images[0].pixels.size:
                    raise BadMedia(
                        f"the frame has another size than the first: {width} x {height}",
                        remedy="send frames of one size",
                    )
                images.append(image)
        digests = "".join(image.digest for image in images)
        return Video(
            tuple(image.pixels for image in images), hashlib.sha256(digests.encode()).hexdigest()
        )

    def _too_many_frames(self) -> BadMedia:
        return BadMedia(
            "the video is too large up to this frame: its frames may have "
            f"{self.config.max_media_bytes} bytes and {self.config.max_video_pixels} pixels in all",
            remedy="send fewer or smaller frames",
        )

    def _read(
        self, reference: str | Source, modality: Modality, deadline: Deadline | None = None
    ) -> bytes:
        """The bytes that the reference stands for."""
        source = reference
        if isinstance(source, str):
            source = parse_reference(source, self.config.max_media_bytes)
        match source:
            case Inline(data, media_type):
                _check_type(media_type, modality)
                return data
            case Remote():
                return fetch(source, self.config, deadline)
            case LocalFile():
                return read_file(source, self.config)


def _check_type(media_type: str, modality: Modality) -> None:
    """Refuse data that calls itself another modality; its bytes decide about all the rest."""
    claimed = media_type.partition("/")[0]
    if claimed in ("image", "audio", "video") and claimed != modality:
        raise BadMedia(f"data of type {media_type[:40]!r} was given as {modality}")


@contextmanager
def named(field: str | None) -> Iterator[None]:
    """Give the refusals of the parts, which know no request, the field that they are about."""
    try:
        yield
    except RequestError as error:
        error.field = error.field or field
        raise
