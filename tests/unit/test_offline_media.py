"""`multi_modal_data` and content parts offline: the same media by every spelling, refusals by field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loramux.config import MediaConfig
from loramux.errors import Forbidden, InvalidField, RequestError
from loramux.media.in_memory import audio_in_memory, image_in_memory, video_in_memory
from loramux.offline_media import OfflineMedia
from media_files import data_url, random_image, random_pixels, random_png, wav

ALL = frozenset({"image", "audio", "video"})
OFFLINE = OfflineMedia(MediaConfig(), ALL)
SAMPLES = np.random.default_rng(1).uniform(-1, 1, 99).astype(np.float32)
FRAMES = [random_image(seed) for seed in range(3)]


def test_every_spelling_of_multi_modal_data() -> None:
    image, sound, video = random_image(1), (SAMPLES, 8000), FRAMES
    wanted = [image_in_memory(image), audio_in_memory(sound), video_in_memory(video)]
    array = np.stack([np.asarray(frame) for frame in FRAMES])
    for data in (
        {"image": image, "audio": sound, "video": video},
        {"image": [image], "audio": [sound], "video": [video]},
        {"image": random_pixels(1, 7, 13), "audio": wanted[1], "video": array},
        {"image": [wanted[0]], "audio": [list(sound)], "video": [array]},
        {"image": image, "audio": sound, "video": tuple(video), "nothing": None},
        {"image": image, "audio": sound, "video": [wanted[2]]},
    ):
        assert OFFLINE.of_data(data) == wanted
    several = OFFLINE.of_data({"image": [image, random_image(2)], "audio": [sound, sound]})
    assert several == [wanted[0], image_in_memory(random_image(2)), wanted[1], wanted[1]]
    many = OfflineMedia(MediaConfig(limit_mm_per_prompt={"video": 2}), ALL)
    assert many.of_data({"video": [video, array]}) == [wanted[2]] * 2
    assert OFFLINE.of_data({}) == OFFLINE.of_data({"image": []}) == []


def test_references_under_the_same_allow_lists(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(random_png(1))
    (tmp_path / "a.wav").write_bytes(wav(bytes(50)))
    data = {
        "image": [data_url(random_png(1)), str(tmp_path / "a.png"), tmp_path / "a.png"],
        "audio": f"file://{tmp_path}/a.wav",
        "video": [str(tmp_path / "a.png"), data_url(random_png(2))],
    }
    opened = OfflineMedia(MediaConfig(allowed_local_media_path=str(tmp_path)), ALL)
    first, second, third, sound, video = opened.of_data(data)
    assert first == second == third and sound.rate == 16_000 and len(video.frames) == 2  # type: ignore[union-attr]
    with pytest.raises(Forbidden) as caught:
        OFFLINE.of_data({"image": [data_url(random_png(1)), str(tmp_path / "a.png")]})
    assert caught.value.field == "multi_modal_data.image.1"


@pytest.mark.parametrize(
    ("data", "field", "said"),
    [
        ({"smell": 1, "image": FRAMES[0]}, "multi_modal_data", "smell"),
        ({"image": [FRAMES[0]] * 9}, "multi_modal_data", "9 of image"),
        ({"image": [FRAMES[0], 3]}, "multi_modal_data.image.1", "PIL image"),
        ({"image": data_url(b"junk")}, "multi_modal_data.image.0", "no format"),
        ({"audio": SAMPLES}, "multi_modal_data.audio.0", "pair of samples"),
        ({"audio": [(SAMPLES, 8000), SAMPLES]}, "multi_modal_data.audio.1", "pair of samples"),
        ({"video": 3}, "multi_modal_data.video.0", "list of frames"),
        ({"video": []}, "multi_modal_data.video.0", "frames"),
        ({"video": "data:video/mp4;base64,AAAA"}, "multi_modal_data.video.0", "frames"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_data(data: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        OFFLINE.of_data(data)
    assert caught.value.field == field


def test_a_model_that_takes_less() -> None:
    with pytest.raises(InvalidField, match="has audio, video, and this model takes image"):
        OfflineMedia(MediaConfig(), frozenset({"image"})).of_data(
            {"audio": (SAMPLES, 8000), "image": FRAMES[0], "video": FRAMES}
        )


def test_conversations() -> None:
    messages = [
        {"role": "system", "content": "be short"},
        {
            "role": "user",
            "name": "me",
            "content": [
                {"type": "image_pil", "image_pil": FRAMES[0]},
                {"type": "text", "text": "and"},
                {"type": "image_url", "image_url": {"url": data_url(random_png(2))}},
            ],
        },
        {"role": "assistant", "content": None, "tool_calls": [1]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    turns, media = OFFLINE.of_messages(messages)
    assert [turn["content"] for turn in turns] == [
        [{"type": "text", "text": "be short"}],
        [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}],
        [],
        [{"type": "text", "text": "a\nb"}],
    ]
    assert turns[1]["name"] == "me" and turns[2]["tool_calls"] == [1]
    assert media[0] == image_in_memory(FRAMES[0])
    assert media[1].pixels.tobytes() == random_image(2).tobytes()  # type: ignore[union-attr]


def test_refused_conversations() -> None:
    picture = {"type": "image_pil", "image_pil": FRAMES[0]}
    for part, role, takes, field in (
        ({"type": "image_pil", "image_pil": 3}, "user", ALL, "messages.1.content.0.image_pil"),
        ({"type": "smell"}, "user", ALL, "messages.1.content.0.type"),
        (picture, "assistant", ALL, "messages.1.content.0.image_pil"),
        (picture, "user", {"audio"}, "messages.1.content.0.image_pil"),
        (picture, "user", (), "messages.1.content.0.image_pil"),
    ):
        offline = OfflineMedia(MediaConfig(), frozenset(takes))
        with pytest.raises(InvalidField) as caught:
            offline.of_messages(
                [{"role": "user", "content": "x"}, {"role": role, "content": [part]}]
            )
        assert caught.value.field == field
    with pytest.raises(InvalidField, match="9 of image"):
        OFFLINE.of_messages([{"role": "user", "content": [picture] * 9}])


def test_messages_of_a_text_model_stay_as_they_are() -> None:
    messages = [{"role": "user", "content": [{"type": "anything", "x": 1}]}, {"role": "user"}]
    assert OfflineMedia(MediaConfig(), frozenset()).of_messages(messages) == (messages, [])
