"""Granite Speech's features where torchaudio cannot be had: the same mel spectrogram by torch alone."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, GraniteSpeechFeatureExtractor
from transformers.audio_utils import mel_filter_bank
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

SPECTRUM = {"n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 80}
QUIET = 1e-10  # power
RANGE = 8.0  # decades below the loudest place of a sound that count


def granite_features() -> type[SequenceFeatureExtractor]:
    """The stock class where torchaudio can be imported."""
    if find_spec("torchaudio") is None:
        return TorchGraniteSpeechFeatureExtractor
    return GraniteSpeechFeatureExtractor


class TorchGraniteSpeechFeatureExtractor(GraniteSpeechFeatureExtractor):
    """The stock class's settings and token counts; features equal to rounding (float32)."""

    def __init__(self, **settings: Any):
        spectrum = {name: settings.pop(name, value) for name, value in SPECTRUM.items()}
        self.projector_window_size = settings.pop("projector_window_size", 15)
        self.projector_downsample_rate = settings.pop("projector_downsample_rate", 5)
        # As the stock class has it: a number of mels saved under this name is not used.
        size = settings.pop("feature_size", None) or spectrum["n_mels"]
        settings = {"sampling_rate": 16000, "padding_value": 0.0, **settings}
        SequenceFeatureExtractor.__init__(self, feature_size=size, **settings)
        self.melspec_kwargs = {"sample_rate": self.sampling_rate, **spectrum}

    def __call__(self, audios: Any, device: str | None = "cpu") -> BatchFeature:
        """Sounds [samples] -> `input_features` [B, frames / 2, 2 mels] and their numbers of vectors."""
        waves, lengths = self._get_audios_and_audio_lengths(audios)  # [B, samples]
        sizes = self._get_num_audio_features(lengths)
        places = torch.arange(max(sizes)).view(1, -1)  # [1, S]
        return BatchFeature(
            {
                "input_features": self._extract_mel_spectrograms(waves),
                "audio_embed_sizes": sizes,
                "input_features_mask": places < torch.tensor(sizes).view(-1, 1),  # [B, S]
            }
        )

    def _extract_mel_spectrograms(self, audio: Tensor, device: str = "cpu") -> Tensor:
        mels = self._mels(audio.float()).transpose(1, 2)  # [B, frames, mels]
        logs = mels.clamp(min=QUIET).log10()  # [B, frames, mels]
        loudest = logs.amax(dim=(1, 2), keepdim=True)  # [B, 1, 1]
        logs = torch.maximum(logs, loudest - RANGE) / 4 + 1  # [B, frames, mels]
        even = logs[:, : logs.shape[1] // 2 * 2]  # [B, frames, mels]
        return even.reshape(len(even), -1, 2 * even.shape[-1])  # [B, frames / 2, 2 mels]

    def _mels(self, waves: Tensor) -> Tensor:
        """[B, samples] -> power [B, mels, frames], by torchaudio's defaults."""
        sizes = self.melspec_kwargs
        spectrum = torch.stft(
            waves,
            sizes["n_fft"],
            sizes["hop_length"],
            sizes["win_length"],
            window=torch.hann_window(sizes["win_length"]),  # [window]
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )  # [B, frequencies, frames]
        filters = mel_filter_bank(
            num_frequency_bins=sizes["n_fft"] // 2 + 1,
            num_mel_filters=sizes["n_mels"],
            min_frequency=0.0,
            max_frequency=sizes["sample_rate"] / 2,
            sampling_rate=sizes["sample_rate"],
            mel_scale="htk",
        )
        weights = torch.from_numpy(filters).float()  # [frequencies, mels]
        return torch.einsum("bft,fm->bmt", spectrum.abs().pow(2), weights)  # [B, mels, frames]
