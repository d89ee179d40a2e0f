"""What requests may bring along as images, sounds and video frames, and from where."""

from __future__ import annotations

import os
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from loramux.config.other_names import by_field_names

Modality = Literal["image", "audio", "video"]

DEFAULT_ITEMS: dict[Modality, int] = {"image": 8, "audio": 4, "video": 1}

# Pillow itself warns above this many pixels; a larger limit of ours would not be the one in force.
PILLOW_MAX_PIXELS = 89_478_485

_DOMAIN = re.compile(r"(?:\*|\.?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)(?::[0-9]{1,5})?")


class MediaConfig(BaseModel):
    """Where media may come from and how large they may be. By default a request must carry its media:
    no host and no folder is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    allowed_media_domains: list[str] = Field(default_factory=list)
    """Hosts that media are fetched from over http and https: `example.com` for this name alone,
    `.example.com` with all its subdomains, `*` for every host with public addresses. Each means the
    scheme's own port unless it names one (`example.com:8443`). Private addresses are refused whatever
    name leads to them."""

    allowed_media_roots: list[str] = Field(default_factory=list)
    """Folders that `file://` URLs and paths may lie in, by absolute path; links may not leave them. A
    relative path is looked for in each, in this order. vLLM's `allowed_local_media_path` is one such
    folder."""

    max_media_bytes: int = Field(default=32 << 20, ge=1)
    """Largest image, sound or video (all its frames together), as encoded in its file."""

    max_image_pixels: int = Field(default=48 << 20, ge=1, le=PILLOW_MAX_PIXELS)
    """Most pixels of one image, told from its header before anything is decoded. The default is the
    photo of a 50-megapixel phone (8192 x 6144), 144 MiB when decoded."""

    max_video_frames: int = Field(default=128, ge=1)
    """Most frames of one video."""

    max_video_pixels: int = Field(default=256 << 20, ge=1)
    """Most pixels of all frames of one video together. The default is 128 frames of 1920 x 1080, 768 MiB
    when decoded."""

    max_audio_s: float = Field(default=600.0, gt=0)
    """Longest sound, in seconds."""

    max_items_per_request: dict[Modality, int] = Field(default_factory=lambda: dict(DEFAULT_ITEMS))
    """How many items of each modality one request may carry; also under vLLM's name
    `limit_mm_per_prompt`. A modality that is left out keeps its default; 0 forbids it."""

    fetch_timeout_s: float = Field(default=10.0, gt=0)
    """How long one fetch may take altogether, redirects included (for a video: all its frames)."""

    max_redirects: int = Field(default=3, ge=0)
    """How many redirects a fetch follows, each checked like the first URL; 0 follows none."""

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, data: Any) -> Any:
        """Take a field under vLLM's name, in vLLM's shape."""
        if isinstance(data, dict) and isinstance(path := data.get("allowed_local_media_path"), str):
            data = {**data, "allowed_local_media_path": [path] if path else []}
        return by_field_names(data, cls.model_fields)

    @field_validator("allowed_media_domains", mode="before")
    @classmethod
    def _no_domains(cls, value: Any) -> Any:
        return [] if value is None else value

    @field_validator("allowed_media_domains")
    @classmethod
    def _domains(cls, value: list[str]) -> list[str]:
        lowered = [domain.lower() for domain in value]
        wrong = [domain for domain in lowered if not _DOMAIN.fullmatch(domain)]
        if wrong:
            raise ValueError(
                f"allowed_media_domains holds {', '.join(map(repr, wrong))}: write host names without "
                "scheme and path (example.com, .example.com, example.com:8443, or * for all)"
            )
        return lowered

    @field_validator("allowed_media_roots")
    @classmethod
    def _roots(cls, value: list[str]) -> list[str]:
        wrong = [root for root in value if not os.path.isabs(root) or "\0" in root]
        if wrong:
            listed = ", ".join(map(repr, wrong))
            raise ValueError(f"allowed_media_roots holds {listed}: name absolute paths of folders")
        return value

    @field_validator("max_items_per_request", mode="before")
    @classmethod
    def _rest_by_default(cls, value: Any) -> Any:
        return {**DEFAULT_ITEMS, **value} if isinstance(value, dict) else value

    @field_validator("max_items_per_request")
    @classmethod
    def _no_negative_counts(cls, value: dict[Modality, int]) -> dict[Modality, int]:
        wrong = [modality for modality, count in value.items() if count < 0]
        if wrong:
            raise ValueError(f"max_items_per_request is negative for {', '.join(wrong)}")
        return value
