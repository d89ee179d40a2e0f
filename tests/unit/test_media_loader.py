"""The loader: every kind of reference to every modality, and refusals that name their field."""

from __future__ import annotations

import base64
import hashlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from loramux.config import MediaConfig
from loramux.content import media_of, parse_parts
from loramux.errors import BadMedia, Forbidden, InvalidField, MediaUnavailable, RequestError
from loramux.media import Image, Inline, LocalFile, MediaLoader, Remote, Video, inline_base64
from loramux.server.errors import response_of
from media_files import data_url, encoded, random_image, random_png, wav
from media_hosts import Internet, internet_of, ok

LOADER = MediaLoader(MediaConfig())


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Internet]:
    with internet_of(monkeypatch) as internet:
        yield internet


def test_the_same_image_by_every_reference(internet: Internet, tmp_path: Path) -> None:
    data = random_png(1)
    internet.add("cdn.test", ok(data))
    (tmp_path / "a b.png").write_bytes(data)
    loader = MediaLoader(
        MediaConfig(allowed_media_domains=["cdn.test"], allowed_media_roots=[str(tmp_path)])
    )
    references = [
        data_url(data),
        data_url(data, "application/octet-stream"),
        Inline(data),
        inline_base64(base64.b64encode(data).decode(), 1000),
        "http://cdn.test/a.png",
        Remote("http", "cdn.test", 80, "/"),
        f"file://{tmp_path}/a%20b.png",
        str(tmp_path / "a b.png"),
        "a b.png",
        LocalFile("a b.png"),
    ]
    images = [loader.image(reference) for reference in references]
    assert {image.digest for image in images} == {hashlib.sha256(data).hexdigest()}
    for image in images:
        np.testing.assert_array_equal(np.asarray(image.pixels), np.asarray(random_image(1)))


def test_content_parts_are_loaded_by_their_kind() -> None:
    png, sound = random_png(3), wav(bytes(range(200)))
    jpeg = base64.b64encode(encoded(random_image(4), "JPEG")).decode()
    base = base64.b64encode(sound).decode()
    parts = parse_parts(
        [
            {"type": "image_url", "image_url": {"url": data_url(png)}},
            {"type": "audio_url", "audio_url": {"url": data_url(sound, "audio/wav")}},
            {"type": "input_audio", "input_audio": {"data": base, "format": "wav"}},
            {"type": "video_url", "video_url": f"data:video/jpeg;base64,{jpeg},{jpeg}"},
            {"type": "image_pil", "image_pil": random_image(3)},
        ],
        prefix="messages.1.content.",
        offline=True,
    )
    image, first, second, video, in_memory = (LOADER.part(part) for part in media_of(parts))
    assert image == LOADER.image(Inline(png)) and first == second == LOADER.audio(Inline(sound))
    assert isinstance(video, Video) and len(video.frames) == 2
    assert isinstance(in_memory, Image) and in_memory.pixels.tobytes() == image.pixels.tobytes()


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": data_url(b"nothing")}}, BadMedia),
        ({"type": "image_url", "image_url": {"url": data_url(b"x", "audio/wav")}}, BadMedia),
        ({"type": "image_url", "image_url": {"url": "https://a.test/x"}}, Forbidden),
        ({"type": "audio_url", "audio_url": {"url": "/etc/passwd"}}, Forbidden),
        ({"type": "input_audio", "input_audio": {"data": "!!", "format": "wav"}}, BadMedia),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, BadMedia),
        ({"type": "video_url", "video_url": "data:video/mp4;base64,AAAA"}, BadMedia),
        ({"type": "image_pil", "image_pil": "no image"}, InvalidField),
    ],
    ids=str,
)
def test_refusals_name_the_part(part: dict[str, object], kind: type[RequestError]) -> None:
    [parsed] = media_of(parse_parts([part], prefix="messages.1.content.", offline=True))
    with pytest.raises(kind) as caught:
        LOADER.part(parsed)
    assert caught.value.field == f"messages.1.content.0.{part['type']}"


def test_the_same_sound_by_every_reference(internet: Internet, tmp_path: Path) -> None:
    data = wav(bytes(range(200)))
    internet.add("cdn.test", ok(data))
    (tmp_path / "a.wav").write_bytes(data)
    loader = MediaLoader(
        MediaConfig(allowed_media_domains=["cdn.test"], allowed_media_roots=[str(tmp_path)])
    )
    text = base64.b64encode(data).decode()
    expected = np.frombuffer(bytes(range(200)), "<i2") / 32768
    for reference in (
        data_url(data, "audio/wav"),
        "http://cdn.test/",
        "a.wav",
        inline_base64(text, 1000),
    ):
        np.testing.assert_allclose(loader.audio(reference).samples, expected, atol=1e-7)


def test_videos_as_lists_and_as_one_data_url(tmp_path: Path) -> None:
    jpegs = [encoded(random_image(seed), "JPEG") for seed in range(5)]
    (tmp_path / "frame").write_bytes(jpegs[2])
    loader = MediaLoader(MediaConfig(allowed_media_roots=[str(tmp_path)]))
    mixed = [
        *map(Inline, jpegs[:2]),
        "frame",
        *(data_url(jpeg, "image/jpeg") for jpeg in jpegs[3:]),
    ]
    joined = ",".join(base64.b64encode(jpeg).decode() for jpeg in jpegs)
    listed, in_one = loader.video(mixed), loader.video(f"data:video/jpeg;base64,{joined}")
    assert listed == in_one and len(listed.frames) == 5
    for jpeg, one, other in zip(jpegs, listed.frames, in_one.frames, strict=True):
        expected = np.asarray(loader.image(Inline(jpeg)).pixels)
        np.testing.assert_array_equal(np.asarray(one), expected)
        np.testing.assert_array_equal(np.asarray(other), expected)
    assert loader.video(mixed[::-1]) != listed  # the order counts
    assert loader.video(mixed[:1]).digest != loader.image(mixed[0]).digest


def frames(count: int, width: int = 13) -> list[Inline]:
    return [Inline(random_png(seed, width)) for seed in range(count)]


def test_videos_are_bounded_as_a_whole() -> None:
    video = frames(4)
    num_bytes, num_pixels = sum(len(frame.data) for frame in video), 4 * 13 * 7
    enough = {"max_video_frames": 4, "max_media_bytes": num_bytes, "max_video_pixels": num_pixels}
    assert len(MediaLoader(MediaConfig(**enough)).video(video).frames) == 4
    for name, said in (
        ("max_video_frames", "4 frames, and 1 to 3"),
        ("max_media_bytes", f"{num_bytes - 1} bytes"),
        ("max_video_pixels", "13 x 7 where 90 are allowed"),
    ):
        less = {**enough, name: enough[name] - 1}
        with pytest.raises(BadMedia, match=said):
            MediaLoader(MediaConfig(**less)).video(video)
    exactly_three = MediaConfig(max_video_pixels=3 * 13 * 7)
    with pytest.raises(BadMedia, match="273 pixels in all"):
        MediaLoader(exactly_three).video(video)


def test_too_many_frames_are_refused_before_the_first() -> None:
    with pytest.raises(BadMedia, match="1000 frames"):
        LOADER.video([Inline(b"broken")] * 1000)
    with pytest.raises(BadMedia, match="0 frames"):
        LOADER.video([])


def test_frames_of_different_sizes() -> None:
    with pytest.raises(BadMedia, match="another size than the first: 14 x 7") as refused:
        LOADER.video([*frames(2), *frames(1, width=14)], field="video")
    assert refused.value.field == "video.2"


def test_the_frames_of_a_video_share_the_deadline(internet: Internet) -> None:
    def slowly(connection: socket.socket) -> None:
        connection.recv(4096)
        threading.Event().wait(0.1)
        connection.sendall(ok(random_png(1)))

    host = internet.add("cdn.test", slowly)
    config = MediaConfig(allowed_media_domains=["cdn.test"], fetch_timeout_s=0.35)
    with pytest.raises(MediaUnavailable, match=r"within 0\.35 s"):
        MediaLoader(config).video(["http://cdn.test/"] * 20)
    assert host.num_connections <= 5


@pytest.mark.parametrize(
    ("modality", "media_type"),
    [
        ("image", "audio/wav"),
        ("image", "video/jpeg"),
        ("audio", "image/png"),
        ("audio", "video/mp4"),
    ],
)
def test_data_of_another_modality(modality: str, media_type: str) -> None:
    with pytest.raises(BadMedia, match=f"{media_type}.* as {modality}"):
        getattr(LOADER, modality)(data_url(random_png(1), media_type))


def test_refusals_name_the_field() -> None:
    for load, error in (
        (lambda field: LOADER.image("ftp://a.test/", field=field), BadMedia),
        (lambda field: LOADER.image("https://a.test/", field=field), Forbidden),
        (lambda field: LOADER.image("/etc/passwd", field=field), Forbidden),
        (lambda field: LOADER.image("data:,x", field=field), BadMedia),
        (lambda field: LOADER.audio("data:,x", field=field), BadMedia),
        (lambda field: LOADER.video("/film.mp4", field=field), BadMedia),
    ):
        with pytest.raises(error) as refused:
            load("messages.0.content.1.image_url")
        assert refused.value.field == "messages.0.content.1.image_url"
        assert isinstance(refused.value, RequestError)
        assert response_of(refused.value).status_code == (403 if error is Forbidden else 400)


def test_counts_are_refused_all_at_once() -> None:
    LOADER.check_counts({"image": 8, "audio": 4, "video": 1})
    LOADER.check_counts({})
    with pytest.raises(InvalidField, match=r"9 of image where 8.*2 of video where 1") as refused:
        LOADER.check_counts({"image": 9, "audio": 4, "video": 2}, field="messages")
    assert refused.value.field == "messages"
    none = MediaLoader(MediaConfig(max_items_per_request={"image": 0}))
    with pytest.raises(InvalidField, match="1 of image where 0"):
        none.check_counts({"image": 1})
