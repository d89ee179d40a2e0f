"""Sounds: each coding as soundfile reads it, limits that count what comes, hostile files refused."""

from __future__ import annotations

import hashlib
import io
import sys

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.config import MediaConfig
from loramux.errors import BadMedia
from loramux.media.sounds import MAX_CHANNELS, MAX_RATE, MAX_WAV_CHUNKS, MIN_RATE, decode_audio
from media_files import wav

CONFIG = MediaConfig()


def written(samples: np.ndarray, rate: int, **options: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **options)
    return file.getvalue()


def noise(seed: int, num_frames: int = 500, channels: int = 1) -> np.ndarray:
    """float64 [S, C] in -0.9..0.9"""
    return np.random.default_rng(seed).uniform(-0.9, 0.9, (num_frames, channels))


def tone(num_frames: int, rate: int) -> np.ndarray:
    """float64 [S]"""
    return 0.5 * np.sin(np.arange(num_frames) * 2 * np.pi * 440 / rate)


@pytest.mark.parametrize("coding", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("kind", ["WAV", "WAVEX"])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_wav_as_soundfile_reads_it(coding: str, kind: str, channels: int) -> None:
    data = written(noise(1, channels=channels), 22_050, format=kind, subtype=coding)
    expected, _ = soundfile.read(io.BytesIO(data), dtype="float64", always_2d=True)
    sound = decode_audio(data, CONFIG)
    assert sound.samples.dtype == np.float32 and sound.samples.shape == (500,)
    assert (sound.rate, sound.seconds) == (22_050, 500 / 22_050)
    assert sound.digest == hashlib.sha256(data).hexdigest()
    np.testing.assert_allclose(sound.samples, expected.mean(axis=1), rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    ("bits", "least"), [(8, 0), (16, -(1 << 15)), (24, -(1 << 23)), (32, -(1 << 31))]
)
def test_full_scale(bits: int, least: int) -> None:
    body = least.to_bytes(bits // 8, "little", signed=least < 0)
    assert decode_audio(wav(body, bits=bits), CONFIG).samples.tolist() == [-1.0]


def test_wav_by_hand() -> None:
    body = np.array([1, -2, 3], "<i2").tobytes()
    expected = [1 / 32768, -2 / 32768, 3 / 32768]
    junk = b"LIST" + (5).to_bytes(4, "little") + b"abcde\0"  # of odd size, so with a filling byte
    for data in (
        wav(body),
        wav(body, extensible=True),
        wav(body, before=junk),
        wav(body, data_size=0xFFFF_FFFF),  # a stream whose length was not known
        wav(body) + junk,
    ):
        assert decode_audio(data, CONFIG).samples.tolist() == expected


@pytest.mark.parametrize(
    ("kind", "coding"), [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]
)
@pytest.mark.parametrize("channels", [1, 2])
def test_compressed_sounds(kind: str, coding: str | None, channels: int) -> None:
    rate, original = 48_000, tone(150_000, 48_000)
    options = {"subtype": coding} if coding else {}
    data = written(np.stack([original] * channels, axis=1), rate, format=kind, **options)
    sound = decode_audio(data, CONFIG)
    assert sound.rate == rate and len(sound.samples) == 150_000
    assert np.abs(sound.samples[1000:-1000] - original[1000:-1000]).max() < 0.05


def test_mp3_without_tags_is_known_by_its_sync() -> None:
    data = written(tone(50_000, 16_000), 16_000, format="MP3")
    start = data.index(b"\xff", 1) if data[:3] == b"ID3" else 0
    tagged = b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + data[start:]
    for variant in (data[start:], tagged):
        assert decode_audio(variant, CONFIG).rate == 16_000


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3"])
def test_without_soundfile_there_is_a_remedy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(tone(5_000, 16_000), 16_000, format=kind)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(BadMedia, match=rf"{kind}.*loramux\[audio\]"):
        decode_audio(data, CONFIG)
    assert len(decode_audio(wav(bytes(10)), CONFIG).samples) == 5


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"\xff", "unknown format"),
        (b"hello", "unknown format"),
        (b"\0\0\0\x20ftypM4A ", "M4A"),
        (b"\x1a\x45\xdf\xa3....", "WebM"),
        (b"\xff\xf1\x50\x80AAC", "unknown format"),
        (wav(b"ab", code=7, bits=8), "0x7"),
        (wav(b"abc", bits=12), "12 bits"),
        (wav(b"abcd", bits=16, code=3), "0x3"),
        (wav(b"ab", bits=0), "no samples"),
        (wav(b""), "no samples"),
        (wav(b"abc"), "within a sample"),
        (wav(b"ab", data_size=4), "shorter than its header"),
        (wav(b"ab")[:30], "broken"),
        (wav(b"ab")[:12], "no format chunk"),
        (wav(b"ab").replace(b"fmt ", b"junk"), "no format chunk"),
        (wav(b"ab", before=b"data\0\0\0\0" * MAX_WAV_CHUNKS), "no format chunk"),
        (wav(bytes(2 * (MAX_CHANNELS + 1)), channels=MAX_CHANNELS + 1), "channels"),
        (wav(b"ab", channels=0), "no samples"),
        (wav(b"ab", rate=0), "0 samples a second"),
        (wav(b"ab", rate=MIN_RATE - 1), "samples a second"),
        (wav(b"ab", rate=MAX_RATE + 1), "samples a second"),
        (wav(np.array([0, np.nan], "<f4").tobytes(), bits=32, code=3), "finite"),
        (wav(np.array([np.inf], "<f4").tobytes(), bits=32, code=3), "finite"),
        (wav(np.array([1e300], "<f8").tobytes(), bits=64, code=3), "finite"),
        (wav(np.array([3e38, 3e38], "<f4").tobytes(), bits=32, code=3, channels=2), "finite"),
    ],
)
def test_what_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(BadMedia, match=said):
        decode_audio(data, CONFIG)


def test_a_truncated_flac() -> None:
    data = written(noise(2, 100_000), 16_000, format="FLAC")
    with pytest.raises(BadMedia, match="broken or truncated"):
        decode_audio(data[: len(data) // 2], CONFIG)


@pytest.mark.parametrize("kind", ["OGG", "MP3"])
def test_of_a_truncated_stream_what_is_there(kind: str) -> None:
    data = written(noise(2, 100_000), 16_000, format=kind)
    whole = decode_audio(data, CONFIG).samples
    part = decode_audio(data[: len(data) // 2], CONFIG).samples
    assert 20_000 < len(part) < 80_000
    np.testing.assert_allclose(part[:20_000], whole[:20_000], atol=1e-6)


def test_refusals_hold_no_addresses_of_our_memory() -> None:
    data = written(tone(5_000, 16_000), 16_000, format="OGG")
    with pytest.raises(BadMedia, match="the data") as refused:
        decode_audio(data[:200], CONFIG)
    assert "0x" not in str(refused.value)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "MP3"])
def test_seconds_are_bounded(kind: str) -> None:
    data = written(tone(16_000, 8_000), 8_000, format=kind)
    assert decode_audio(data, MediaConfig(max_audio_s=2)).seconds == 2
    with pytest.raises(BadMedia, match=r"longer than the 1\.99 s"):
        decode_audio(data, MediaConfig(max_audio_s=1.99))


def test_a_sound_bomb_is_left_when_it_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 1000
    data = written(np.zeros(seconds * 8_000, np.int16), 8_000, format="FLAC")
    assert len(data) < seconds * 8_000 / 20
    read, num_read = soundfile.SoundFile.read, []

    def counted(self: soundfile.SoundFile, *args: object, **options: object) -> np.ndarray:
        block = read(self, *args, **options)
        num_read.append(len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    with pytest.raises(BadMedia, match="longer"):
        decode_audio(data, MediaConfig(max_audio_s=10))
    assert 10 * 8_000 < sum(num_read) < 20 * 8_000


def test_bytes_are_counted_first() -> None:
    data = wav(bytes(100))
    assert decode_audio(data, MediaConfig(max_media_bytes=len(data))).samples.shape == (50,)
    with pytest.raises(BadMedia, match=f"{len(data)} bytes"):
        decode_audio(data, MediaConfig(max_media_bytes=len(data) - 1))


SMALL = MediaConfig(max_audio_s=2)
VALID = [
    wav(bytes(range(60))),
    wav(bytes(range(60)), bits=24, channels=2, extensible=True),
    wav(np.linspace(-1, 1, 20, dtype="<f4").tobytes(), bits=32, code=3),
    *(written(noise(3, 400), 16_000, format=kind) for kind in ("FLAC", "OGG", "MP3")),
]


def sound_or_refusal(data: bytes) -> None:
    try:
        sound = decode_audio(data, SMALL)
    except BadMedia as error:
        assert "\n" not in str(error)
    else:
        assert np.isfinite(sound.samples).all() and 0 < sound.seconds <= 2


@given(st.sampled_from([b"", *(data[:40] for data in VALID)]), st.binary(max_size=200))
def test_random_bytes_are_a_sound_or_a_refusal(head: bytes, tail: bytes) -> None:
    sound_or_refusal(head + tail)


@settings(max_examples=300)
@given(st.data())
def test_damaged_files_are_a_sound_or_a_refusal(draw: st.DataObject) -> None:
    data = bytearray(draw.draw(st.sampled_from(VALID)))
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(data) - 1))
        width = draw.draw(st.integers(0, 4))
        data[at : at + width] = draw.draw(st.binary(max_size=4))
    sound_or_refusal(bytes(data))
