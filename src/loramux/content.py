"""Content of chat messages in OpenAI's and vLLM's shapes: texts and references to media, in order.

    {"type": "text", "text": ...}
    {"type": "image_url", "image_url": {"url": ..., "detail": "auto"}}    or "image_url": "..."
    {"type": "audio_url", "audio_url": {"url": ...}}                      or "audio_url": "..."
    {"type": "video_url", "video_url": {"url": ...}}                      or "video_url": "..."
    {"type": "input_audio", "input_audio": {"data": base64, "format": "wav"}}

As in vLLM the type of a part with media may be left out. Nothing is read here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loramux.errors import InvalidField
from loramux.types import Modality

KINDS: dict[str, Modality] = {
    "image_url": "image",
    "audio_url": "audio",
    "input_audio": "audio",
    "video_url": "video",
    "image_pil": "image",
}
OFFLINE_KINDS = frozenset({"image_pil"})  # objects of this process, which no JSON holds
# Turns that may carry media. What a model has said, it has said in words.
MEDIA_ROLES = frozenset({"user", "system", "developer"})

# What "detail" may ask for: the resolution that the model's own processor gives.
SERVED_DETAIL = (None, "auto", "high")


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class MediaPart:
    """A reference to media. `value` is a URL or path; of `input_audio` bare base64, and `format` its
    format; of `image_pil` the image. `where` it stands is the path of the field, for refusals."""

    kind: str
    modality: Modality
    value: Any = field(repr=False)
    where: str
    format: str = ""

    @property
    def is_inline(self) -> bool:
        """Whether all of it is here, so that nobody has to be waited for."""
        return self.kind in ("input_audio", "image_pil") or self.value[:5].lower() == "data:"


Part = TextPart | MediaPart


def parse_parts(parts: Sequence[Any], *, prefix: str = "", offline: bool = False) -> list[Part]:
    """The parts of one message. Raises InvalidField; its field, as each part's `where`, is `prefix`, the
    index of the part, and what of it."""
    return [_parse(part, f"{prefix}{index}", offline) for index, part in enumerate(parts)]


def media_of(parts: Iterable[Part]) -> list[MediaPart]:
    return [part for part in parts if isinstance(part, MediaPart)]


def joined_text(parts: Sequence[Part]) -> str | None:
    """The text parts joined by newlines; None if there are others."""
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    return "\n".join(texts) if len(texts) == len(parts) else None


def template_parts(content: str | Sequence[Part]) -> list[dict[str, str]]:
    """The content as chat templates of multimodal models take it: `{"type": "text", "text": ...}`
    and, for each item of media, `{"type": "image"}`."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if content and (text := joined_text(content)) is not None:
        return [{"type": "text", "text": text}]
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": part.modality}
        for part in content
    ]


def check_role(role: Any, media: Sequence[MediaPart], *, prefix: str = "") -> None:
    """Raise InvalidField if a turn of this role carries `media` and may not."""
    if media and role not in MEDIA_ROLES:
        raise InvalidField(
            f"a {role} message carries media",
            field=prefix + media[0].where,
            remedy=f"send them in a message of {' or '.join(sorted(MEDIA_ROLES))}",
        )


def check_text(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no text and would break the tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is not text") from None
    return text


def check_modalities(media: Sequence[MediaPart], takes: Iterable[str]) -> None:
    """Raise InvalidField, naming the first, if there are media that are none of what a model `takes`."""
    known = sorted(takes)
    wrong = [part for part in media if part.modality not in known]
    if not wrong:
        return
    kinds = ", ".join(sorted({repr(part.kind) for part in wrong}))
    is_text_model = "this is a text model"
    is_other = f"this model takes {' and '.join(known)} beside text"
    raise InvalidField(
        f"content of type {kinds} is refused: {is_other if known else is_text_model}",
        field=wrong[0].where,
        remedy='send parts of type "text"' if not known else f"send {' or '.join(known)}",
    )


def _parse(part: Any, where: str, offline: bool) -> Part:
    if not isinstance(part, Mapping):
        raise InvalidField("a content part must be an object with a type", field=where)
    kind = part.get("type")
    if kind is None:
        kind = next((name for name in KINDS if name in part), None)
    served = ["text", *(name for name in KINDS if offline or name not in OFFLINE_KINDS)]
    if kind not in served:
        raise InvalidField(
            f"a content part of type {_shown(kind)} is refused",
            field=f"{where}.type",
            remedy=f"send {', '.join(served)}",
        )
    _check_fields(part, {"type", kind}, where)
    value = part.get(kind)
    if kind == "text":
        return TextPart(_text(value, f"{where}.text"))
    if kind == "input_audio":
        return _input_audio(value, f"{where}.{kind}")
    if kind in OFFLINE_KINDS:
        return MediaPart(kind, KINDS[kind], value, f"{where}.{kind}")
    return MediaPart(kind, KINDS[kind], _url(value, kind, f"{where}.{kind}"), f"{where}.{kind}")


def _url(value: Any, kind: str, where: str) -> str:
    """The reference in `{"url": ...}` or in a plain string."""
    if isinstance(value, Mapping):
        _check_fields(value, {"url", "detail"} if kind == "image_url" else {"url"}, where)
        if value.get("detail") not in SERVED_DETAIL:
            raise InvalidField(
                f"detail {_shown(value['detail'])} is refused: images are taken at the resolution of "
                "the model's own processor",
                field=f"{where}.detail",
                remedy="leave detail out",
            )
        value, where = value.get("url"), f"{where}.url"
    if not isinstance(value, str) or not value:
        raise InvalidField("a URL is required, as text", field=where)
    return value


def _input_audio(value: Any, where: str) -> MediaPart:
    if not isinstance(value, Mapping):
        raise InvalidField("an object with data and format is required", field=where)
    _check_fields(value, {"data", "format"}, where)
    data, kind = value.get("data"), value.get("format")
    if not isinstance(data, str) or not data:
        raise InvalidField("base64 is required, as text", field=f"{where}.data")
    if not isinstance(kind, str) or not kind:
        raise InvalidField("the name of a format is required", field=f"{where}.format")
    return MediaPart("input_audio", "audio", data, where, format=kind)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidField("a text is required", field=where)
    try:
        return check_text(value)
    except ValueError as error:
        raise InvalidField(f"the text {error}", field=where) from None


def _check_fields(given: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InvalidField(
            f"unknown field {_shown(unknown[0])}", field=f"{where}.{str(unknown[0])[:64]}"
        )


def _shown(value: Any) -> str:
    """A client's value in a message; it may be of any size."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
