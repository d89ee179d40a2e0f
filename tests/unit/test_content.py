"""Content parts in OpenAI's and vLLM's shapes; a part that is wrong is refused at its place."""

from __future__ import annotations

from typing import Any

import pytest

from loramux.content import (
    MediaPart,
    TextPart,
    check_modalities,
    check_role,
    joined_text,
    media_of,
    parse_parts,
    template_parts,
)
from loramux.errors import InvalidField

TEXT = {"type": "text", "text": "look"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (TEXT, TextPart("look")),
        (IMAGE, MediaPart("image_url", "image", "data:image/png;base64,AAAA", "0.image_url")),
        (
            {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}},
            MediaPart("image_url", "image", "a.png", "0.image_url"),
        ),
        (
            {"type": "image_url", "image_url": "a.png"},
            MediaPart("image_url", "image", "a.png", "0.image_url"),
        ),
        (
            {"type": "audio_url", "audio_url": {"url": "a.wav"}},
            MediaPart("audio_url", "audio", "a.wav", "0.audio_url"),
        ),
        (
            {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,A,B"}},
            MediaPart("video_url", "video", "data:video/jpeg;base64,A,B", "0.video_url"),
        ),
        (
            {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
            MediaPart("input_audio", "audio", "AAAA", "0.input_audio", "wav"),
        ),
        ({"image_url": "a.png"}, MediaPart("image_url", "image", "a.png", "0.image_url")),
        ({"audio_url": {"url": "a"}}, MediaPart("audio_url", "audio", "a", "0.audio_url")),
    ],
    ids=str,
)
def test_accepted(given: dict[str, Any], part: TextPart | MediaPart) -> None:
    assert parse_parts([given]) == [part]
    assert parse_parts([given], offline=True) == [part]


REFUSED: list[tuple[Any, str]] = [
    ("x", "0"),
    ({}, "0.type"),
    ({"type": ["image_url"]}, "0.type"),
    ({"type": "image"}, "0.type"),
    ({"type": "image_pil", "image_pil": "x"}, "0.type"),
    ({"type": "file", "file": {}}, "0.type"),
    ({"type": "text"}, "0.text"),
    ({"type": "text", "text": 3}, "0.text"),
    ({"type": "text", "text": "\ud800"}, "0.text"),
    ({**TEXT, "mood": "sad"}, "0.mood"),
    ({**IMAGE, "uuid": "1"}, "0.uuid"),
    ({"type": "image_url"}, "0.image_url"),
    ({"type": "image_url", "image_url": ""}, "0.image_url"),
    ({"type": "image_url", "image_url": {"url": 3}}, "0.image_url.url"),
    ({"type": "image_url", "image_url": {"uri": "a"}}, "0.image_url.uri"),
    ({"type": "image_url", "image_url": {"url": "a", "detail": "low"}}, "0.image_url.detail"),
    ({"type": "audio_url", "audio_url": {"url": "a", "detail": "auto"}}, "0.audio_url.detail"),
    ({"type": "input_audio", "input_audio": "AAAA"}, "0.input_audio"),
    ({"type": "input_audio", "input_audio": {"format": "wav"}}, "0.input_audio.data"),
    ({"type": "input_audio", "input_audio": {"data": "AAAA"}}, "0.input_audio.format"),
]


@pytest.mark.parametrize(("given", "field"), REFUSED, ids=str)
def test_refused_where_it_stands(given: Any, field: str) -> None:
    for prefix in ("", "messages.3.content."):
        with pytest.raises(InvalidField) as caught:
            parse_parts([given], prefix=prefix)
        assert caught.value.field == prefix + field
        assert len(str(caught.value)) < 400


def test_a_huge_wrong_value_is_not_repeated() -> None:
    with pytest.raises(InvalidField) as caught:
        parse_parts([{"type": "x" * 10_000_000}])
    assert len(str(caught.value)) < 400


def test_pil_images_are_offline_only() -> None:
    image = object()
    [part] = parse_parts([{"type": "image_pil", "image_pil": image}], offline=True)
    assert isinstance(part, MediaPart) and part.value is image and part.modality == "image"


def test_what_has_to_be_waited_for() -> None:
    inline = [IMAGE, {"image_url": "DATA:,x"}, {"image_pil": object()}]
    inline.append({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}})
    assert all(part.is_inline for part in media_of(parse_parts(inline, offline=True)))
    for url in ("https://a.test/x", "/media/a.png", "file:///data:", "dat"):
        [part] = media_of(parse_parts([{"image_url": url}]))
        assert not part.is_inline


def test_text_alone_is_joined_and_media_keep_their_places() -> None:
    texts = parse_parts([TEXT, {"type": "text", "text": "here"}])
    assert joined_text(texts) == "look\nhere" and joined_text([]) == ""
    assert template_parts(texts) == [{"type": "text", "text": "look\nhere"}]
    assert template_parts("look") == [{"type": "text", "text": "look"}]
    mixed = parse_parts([TEXT, IMAGE, TEXT, {"audio_url": "a"}])
    assert joined_text(mixed) is None
    assert [part["type"] for part in template_parts(mixed)] == ["text", "image", "text", "audio"]
    assert [part.where for part in media_of(mixed)] == ["1.image_url", "3.audio_url"]


def test_a_model_takes_what_it_takes() -> None:
    media = media_of(parse_parts([IMAGE, {"audio_url": "a"}, {"video_url": "b"}]))
    check_modalities(media, ["video", "image", "audio"])
    check_modalities([], [])
    with pytest.raises(InvalidField, match=r"'audio_url', 'video_url'.*takes image") as caught:
        check_modalities(media, ["image"])
    assert caught.value.field == "1.audio_url"
    with pytest.raises(InvalidField, match="this is a text model"):
        check_modalities(media, [])


@pytest.mark.parametrize("role", ["assistant", "tool", None, "narrator"])
def test_roles_that_carry_no_media(role: Any) -> None:
    media = media_of(parse_parts([TEXT, IMAGE]))
    check_role(role, [])
    check_role("user", media)
    check_role("system", media)
    with pytest.raises(InvalidField, match=f"a {role} message") as caught:
        check_role(role, media, prefix="content.")
    assert caught.value.field == "content.1.image_url"
