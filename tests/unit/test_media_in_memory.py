"""Media that a program has decoded itself: taken as they are, told apart by their content."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL.Image
import pytest

from loramux.errors import BadMedia, InvalidField
from loramux.media import Audio, Image, Video
from loramux.media.in_memory import audio_in_memory, image_in_memory, video_in_memory
from media_files import encoded, random_image, random_pixels


def test_an_image_keeps_its_pixels_and_has_its_own_digest() -> None:
    pixels = random_pixels(1, 7, 13)
    image = image_in_memory(PIL.Image.fromarray(pixels))
    np.testing.assert_array_equal(np.asarray(image.pixels), pixels)
    assert image_in_memory(pixels) == image and image_in_memory(image) is image
    others = [random_pixels(2, 7, 13), pixels[::-1].copy(), pixels.reshape(13, 7, 3)]
    assert len({image.digest, *(image_in_memory(other).digest for other in others)}) == 4


def test_a_changed_original_changes_nothing() -> None:
    original = random_image(3)
    image = image_in_memory(original)
    before = np.array(image.pixels)
    original.paste("red", (0, 0, 5, 5))
    np.testing.assert_array_equal(np.asarray(image.pixels), before)
    assert image_in_memory(original) != image


def test_other_modes_become_rgb_over_white_and_no_tag_turns_pixels() -> None:
    clear = image_in_memory(PIL.Image.new("RGBA", (2, 2), (9, 9, 9, 0)))
    assert clear.pixels.mode == "RGB" and clear.pixels.getpixel((0, 0)) == (255, 255, 255)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned = PIL.Image.open(io.BytesIO(encoded(random_image(4), "PNG", exif=exif)))
    image = image_in_memory(turned)
    np.testing.assert_array_equal(np.asarray(image.pixels), random_pixels(4, 7, 13))
    assert not image.pixels.info and not dict(image.pixels.getexif())


def test_a_file_that_breaks_when_it_is_read() -> None:
    data = encoded(random_image(5, 300, 300), "PNG")
    with pytest.raises(BadMedia, match="broken or truncated"):
        image_in_memory(PIL.Image.open(io.BytesIO(data[: len(data) // 2])))


def test_a_sound() -> None:
    samples = np.random.default_rng(1).uniform(-1, 1, 50)
    sound = audio_in_memory((samples, 16_000))
    assert sound.samples.dtype == np.float32 and sound.rate == 16_000
    np.testing.assert_array_equal(sound.samples, samples.astype(np.float32))
    assert audio_in_memory((list(samples), np.int64(16_000))) == sound
    assert audio_in_memory(sound) is sound
    assert len({sound.digest, audio_in_memory((samples, 8_000)).digest}) == 2


def test_a_video() -> None:
    frames = [random_image(seed) for seed in range(3)]
    video = video_in_memory(frames)
    assert len(video.frames) == 3 and video_in_memory(video) is video
    assert video_in_memory(np.stack([np.asarray(frame) for frame in frames])) == video
    assert video_in_memory(frames[::-1]) != video


NO_IMAGES: list[Any] = [
    None,
    3,
    random_pixels(1, 7, 13)[..., :2],
    random_pixels(1, 7, 13).astype(np.float32),
    random_pixels(1, 7, 13)[0],
    Audio(np.zeros(1, np.float32), 1000, "d"),
]
NO_SOUNDS: list[Any] = [
    None,
    np.zeros(5, np.float32),
    (np.zeros(5, np.int16), 8000),
    (np.zeros((2, 5), np.float32), 8000),
    (np.zeros(0, np.float32), 8000),
    (np.array([0.0, np.nan]), 8000),
    (np.zeros(5, np.float32), 0),
    (np.zeros(5, np.float32), 8000.5),
    (np.zeros(5, np.float32), "8000"),
]
NO_VIDEOS: list[Any] = [[], [random_image(1), random_image(1, 9, 9)], ["a"]]


@pytest.mark.parametrize(
    ("convert", "value"),
    [
        *((image_in_memory, value) for value in NO_IMAGES),
        *((audio_in_memory, value) for value in NO_SOUNDS),
        *((video_in_memory, value) for value in NO_VIDEOS),
    ],
)
def test_what_is_none(convert: Any, value: Any) -> None:
    with pytest.raises(InvalidField):
        convert(value)


def test_values_are_hashable_and_small_to_print() -> None:
    values = [
        image_in_memory(random_image(1)),
        audio_in_memory((np.zeros(9), 1000)),
        video_in_memory([random_image(1)]),
    ]
    assert [type(value) for value in values] == [Image, Audio, Video]
    assert len(set(values)) == 3 and all(len(repr(value)) < 200 for value in values)
