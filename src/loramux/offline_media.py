"""Media of offline prompts, in vLLM's shapes: `multi_modal_data`, and content parts of messages.

    {"image": PIL image or [PIL image, ...], "audio": (samples, rate) or [...], "video": [frame, ...]}

An image may also be an array, a URL, a path or a data URL, under the same allow-lists as a server's; a
sound and a frame likewise.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from loramux.config import MediaConfig
from loramux.content import (
    KINDS,
    MediaPart,
    check_modalities,
    check_role,
    media_of,
    parse_parts,
    template_parts,
)
from loramux.errors import InvalidField
from loramux.media import Audio, Image, MediaLoader, Video
from loramux.media.in_memory import audio_in_memory, image_in_memory, video_in_memory
from loramux.media.loader import named

Media = Image | Audio | Video

FIELD = "multi_modal_data"


class OfflineMedia:
    """What prompts bring along for a model that takes `modalities`. Methods block while they load."""

    def __init__(self, config: MediaConfig, modalities: frozenset[str]):
        self._loader = MediaLoader(config)
        self._modalities = modalities

    def of_data(self, data: Mapping[str, Any]) -> list[Media]:
        """The media of one prompt, those of each modality in their order. Raises a RequestError whose
        field is the one to change."""
        listed = {name: _items(name, value) for name, value in data.items() if value is not None}
        foreign = sorted(set(listed) - self._modalities)
        if foreign:
            takes = " and ".join(sorted(self._modalities)) or "text only"
            raise InvalidField(
                f"{FIELD} has {', '.join(foreign)}, and this model takes {takes}",
                field=FIELD,
                remedy=f"leave out {', '.join(foreign)}",
            )
        self._count({name: len(items) for name, items in listed.items()}, FIELD)
        load: dict[str, Callable[[Any], Media]] = {
            "image": self._image,
            "audio": self._audio,
            "video": self._video,
        }
        loaded = []
        for name, items in listed.items():
            for index, item in enumerate(items):
                with named(f"{FIELD}.{name}.{index}"):
                    loaded.append(load[name](item))
        return loaded

    def of_messages(
        self, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[Media]]:
        """Turns for the chat template, and the media that stand in them, in order.

        A text model's messages stay as they are, and may carry none."""
        if not self._modalities:
            _refuse_media(messages)
            return [dict(message) for message in messages], []
        turns, parts = [], []
        for index, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, list):
                content = parse_parts(content, prefix=f"messages.{index}.content.", offline=True)
                check_role(message.get("role"), media_of(content))
                parts += media_of(content)
            turns.append({**message, "content": template_parts([] if content is None else content)})
        check_modalities(parts, self._modalities)
        self._count(Counter(part.modality for part in parts), "messages")
        return turns, [self._loader.part(part) for part in parts]

    def _count(self, counts: Mapping[Any, int], field: str) -> None:
        self._loader.check_counts(counts, field=field)

    def _image(self, item: Any) -> Image:
        reference = _reference(item)
        return image_in_memory(item) if reference is None else self._loader.image(reference)

    def _audio(self, item: Any) -> Audio:
        reference = _reference(item)
        return audio_in_memory(item) if reference is None else self._loader.audio(reference)

    def _video(self, item: Any) -> Video:
        if (reference := _reference(item)) is not None:
            return self._loader.video(reference)
        if isinstance(item, Video):
            return item
        if not isinstance(item, (Sequence, np.ndarray)):
            raise InvalidField(f"a video is a list of frames, not {type(item).__name__}")
        references = [_reference(frame) for frame in item]
        if references and None not in references:
            return self._loader.video([text for text in references if text is not None])
        return video_in_memory([self._image(frame) for frame in item])


def modalities_of(media: Sequence[Media]) -> frozenset[str]:
    """Of which there is at least one."""
    names = {Image: "image", Audio: "audio", Video: "video"}
    return frozenset(names[type(item)] for item in media)


def _reference(item: Any) -> str | None:
    """The URL or path, if it is one."""
    return os.fspath(item) if isinstance(item, (str, os.PathLike)) else None


def _items(modality: str, value: Any) -> list[Any]:
    """One item or several, as a list. Only a list is several; of videos, only a list of videos."""
    if not isinstance(value, list):
        return [value]
    if modality == "video" and not (value and _is_video(value[0])):
        return [value]
    return value


def _is_video(value: Any) -> bool:
    return isinstance(value, (list, tuple, Video)) or (
        isinstance(value, np.ndarray) and value.ndim == 4
    )


def _refuse_media(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise InvalidField if a message has a part that is media."""
    for index, message in enumerate(messages):
        content = message.get("content")
        for position, part in enumerate(content if isinstance(content, list) else ()):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and kind in KINDS:
                where = f"messages.{index}.content.{position}.{kind}"
                check_modalities([MediaPart(kind, KINDS[kind], None, where)], ())
