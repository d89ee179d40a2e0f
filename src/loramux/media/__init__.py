"""Untrusted references to images, sounds and video frames, made into decoded data or refused by name."""

from loramux.media.decoded import Audio, Image, Video
from loramux.media.loader import MediaLoader
from loramux.media.sources import (
    Inline,
    LocalFile,
    Remote,
    Source,
    inline_base64,
    parse_frames,
    parse_reference,
)

__all__ = [
    "Audio",
    "Image",
    "Inline",
    "LocalFile",
    "MediaLoader",
    "Remote",
    "Source",
    "Video",
    "inline_base64",
    "parse_frames",
    "parse_reference",
]
