"""Bytes of a sound file to mono float32 samples: WAV with numpy, FLAC, Ogg and MP3 with soundfile."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loramux.config import MediaConfig
from loramux.errors import BadMedia
from loramux.media.decoded import Audio, broken_is_refused, check_size, digest_of

MAX_CHANNELS = 8
MAX_WAV_CHUNKS = 1024
MIN_RATE, MAX_RATE = 1_000, 192_000  # samples a second; bounds the memory of the seconds allowed

Samples = NDArray[np.float32]

_PCM, _FLOAT, _EXTENSIBLE = 0x0001, 0x0003, 0xFFFE
_STREAMED = 0xFFFF_FFFF  # the size of a data chunk whose writer could not go back to fill it in
_FLOATS = {32: "<f4", 64: "<f8"}
_BLOCK = 1 << 16  # frames decoded at a time
_BY_SOUNDFILE = ("FLAC", "OGG", "MP3")


@dataclass(frozen=True, slots=True)
class _WavFormat:
    code: int
    num_channels: int
    rate: int
    bits: int

    @property
    def frame_bytes(self) -> int:
        return self.num_channels * self.bits // 8


def decode_audio(data: bytes, config: MediaConfig) -> Audio:
    """The sound in `data`, its channels averaged, at its own rate. Raises BadMedia.

    MP3 and Ogg are streams with no end that could be missing: of a truncated one, what is there comes.
    """
    check_size(data, config)
    kind = _kind(data)
    with broken_is_refused("the sound"):
        if kind == "WAV":
            samples, rate = _decode_wav(data, config)
        elif kind in _BY_SOUNDFILE:
            samples, rate = _decode_by_soundfile(kind, data, config)
        else:
            raise BadMedia(
                f"the sound is {kind}, which is not read", remedy="send WAV, FLAC or MP3"
            )
    if not np.isfinite(samples).all():
        raise BadMedia("the sound holds samples that are no finite numbers")
    return Audio(samples, rate, digest_of(data))


def _kind(data: bytes) -> str:
    """The name of the format, by its first bytes."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "WAV"
    if data[:4] == b"fLaC":
        return "FLAC"
    if data[:4] == b"OggS":
        return "OGG"
    if data[4:8] == b"ftyp":
        return "MP4 or M4A"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "WebM or Matroska"
    # MPEG audio: eleven set bits, then a version and a layer; layer bits 00 are AAC's.
    if data[:3] == b"ID3" or (data[0] == 0xFF and data[1:2] >= b"\xe0" and data[1] & 0x06):
        return "MP3"
    return "in an unknown format"


def _check_shape(num_channels: int, rate: int, num_frames: int, config: MediaConfig) -> None:
    """Raise BadMedia for more channels, samples or seconds than are decoded."""
    if not 1 <= num_channels <= MAX_CHANNELS:
        raise BadMedia(f"the sound has {num_channels} channels, and 1 to {MAX_CHANNELS} are read")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise BadMedia(f"the sound has {rate} samples a second, outside {MIN_RATE} to {MAX_RATE}")
    if num_frames > config.max_audio_s * rate:
        raise BadMedia(
            f"the sound is longer than the {config.max_audio_s:g} s allowed",
            remedy="send it in parts, or have the operator raise max_audio_s",
        )


def _decode_wav(data: bytes, config: MediaConfig) -> tuple[Samples, int]:
    layout, body = _wav_chunks(data)
    if layout.frame_bytes < 1 or len(body) < layout.frame_bytes:
        raise BadMedia("the WAV file holds no samples")
    num_frames, rest = divmod(len(body), layout.frame_bytes)
    if rest:
        raise BadMedia("the WAV file ends within a sample: it is truncated")
    _check_shape(layout.num_channels, layout.rate, num_frames, config)
    return _mono(_wav_samples(layout, body).reshape(num_frames, layout.num_channels)), layout.rate


def _wav_chunks(data: bytes) -> tuple[_WavFormat, memoryview]:
    """The format and the bytes of the samples."""
    view, layout, at = memoryview(data), None, 12
    for _ in range(MAX_WAV_CHUNKS):
        if at + 8 > len(view):
            break
        name, size = struct.unpack_from("<4sI", view, at)
        chunk = view[at + 8 : at + 8 + size]
        if name == b"data" and layout:
            if len(chunk) < size != _STREAMED:
                raise BadMedia("the WAV file is shorter than its header says: it is truncated")
            return layout, chunk
        if name == b"fmt ":
            code, num_channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", chunk)
            if code == _EXTENSIBLE:
                (code,) = struct.unpack_from("<H", chunk, 24)
            layout = _WavFormat(code, num_channels, rate, bits)
        at += 8 + size + size % 2
    raise BadMedia("the WAV file has no format chunk with a data chunk after it")


def _wav_samples(layout: _WavFormat, body: memoryview) -> Samples:
    """The samples of all channels, interleaved, float32 [S * C]."""
    if layout.code == _FLOAT and layout.bits in _FLOATS:
        return _as_float32(np.frombuffer(body, np.dtype(_FLOATS[layout.bits])))  # [S * C]
    if layout.code != _PCM or layout.bits not in (8, 16, 24, 32):
        raise BadMedia(
            f"the WAV file has coding {layout.code:#x} with {layout.bits} bits, which is not read",
            remedy="save it as PCM of 8 to 32 bits, or as floats",
        )
    if layout.bits == 8:
        return (_as_float32(np.frombuffer(body, np.uint8)) - np.float32(128)) / np.float32(
            128
        )  # [S * C]
    scale = np.float32(2.0 ** (1 - layout.bits))
    if layout.bits != 24:
        integers = np.frombuffer(body, np.dtype(f"<i{layout.bits // 8}"))  # [S * C]
        return _as_float32(integers) * scale  # [S * C]
    padded = np.zeros((len(body) // 3, 4), np.uint8)  # [S * C, 4]
    padded[:, 1:] = np.frombuffer(body, np.uint8).reshape(-1, 3)
    return _as_float32(padded.view("<i4")[:, 0] >> 8) * scale  # [S * C]


def _as_float32(values: NDArray[Any]) -> Samples:
    """The same numbers; what is too large becomes infinite, which is refused later."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _decode_by_soundfile(kind: str, data: bytes, config: MediaConfig) -> tuple[Samples, int]:
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package is there, the C library is not
        raise BadMedia(
            f"{kind} sounds are not read by this server",
            remedy="send WAV, or have the operator install loramux[audio]",
        ) from None
    mono, num_frames = bytearray(), 0  # grows in place; a list of blocks would be copied at the end
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        rate = file.samplerate
        if file.format not in _BY_SOUNDFILE:
            raise BadMedia(f"the sound begins like {kind} and is {file.format}")
        _check_shape(file.channels, rate, 0, config)
        # Or each read ends with a seek, which in an MP3 is inexact: a click at each block.
        file.seekable = lambda: False
        # What the header says of the length is not believed: frames are counted as they come.
        while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
            num_frames += len(block)
            _check_shape(file.channels, rate, num_frames, config)
            mono += _mono(block).tobytes()
    if not num_frames:
        raise BadMedia(f"the {kind} file holds no samples")
    return np.frombuffer(mono, np.float32), rate  # [S]


def _mono(samples: Samples) -> Samples:
    """The mean of the channels of [S, C], as [S]."""
    if samples.shape[1] == 1:
        return samples[:, 0]
    with np.errstate(over="ignore", invalid="ignore"):
        mean: Samples = samples.mean(axis=1, dtype=np.float32)  # [S]
        return mean
