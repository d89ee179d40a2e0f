"""The real processors of transformers on machines that lack what some of them ask for.

Every image processor here is transformers' PIL one. transformers 5.17 has no video processor and no
`PixtralProcessor` without torchvision, no `SmolVLMProcessor` without num2words, no
`GraniteSpeechFeatureExtractor` without torchaudio, and no image processor of Phi-4-multimodal without
torchvision. `load_processor` puts stand-ins where the package is missing, for the parts that requests
with images and sound do not run, or computes the same by numpy; the processor's class is the real one.
"""

from __future__ import annotations

import functools
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoProcessor,
    BatchFeature,
    GraniteSpeechFeatureExtractor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    processing_utils,
)
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto import (
    feature_extraction_auto,
    image_processing_auto,
    video_processing_auto,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.video_processing_utils import BaseVideoProcessor

import tiny

SAMPLING_RATE = 16000
PIXTRAL = "transformers.models.pixtral"


def tokenizer(named: dict[str, str], more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """That of the text models with special tokens: `named` by the tokenizer's attribute, and `more`."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer().backend_tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=named,
    )
    fast.add_tokens(list(more), special_tokens=True)
    return fast


class NumpyGraniteSpeechFeatureExtractor(GraniteSpeechFeatureExtractor):
    """Granite Speech's features by transformers' own numpy spectrogram instead of torchaudio's."""

    def __init__(self, **settings: Any):
        sizes = {"n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 80}
        sizes = {key: settings.pop(key, value) for key, value in sizes.items()}
        self.projector_window_size = settings.pop("projector_window_size", 15)
        self.projector_downsample_rate = settings.pop("projector_downsample_rate", 5)
        settings = {"sampling_rate": SAMPLING_RATE, "padding_value": 0.0, **settings}
        sizes["n_mels"] = settings.setdefault("feature_size", sizes["n_mels"])  # as it is saved
        self.n_mels = sizes["n_mels"]  # saved too: the stock class reads this one
        super(GraniteSpeechFeatureExtractor, self).__init__(**settings)
        self.melspec_kwargs = {"sample_rate": SAMPLING_RATE, **sizes}

    def __call__(self, audios: Any, device: str | None = "cpu") -> BatchFeature:
        audio, lengths = self._get_audios_and_audio_lengths(audios)
        sizes = self._get_num_audio_features(lengths)
        places = torch.arange(max(sizes)).view(1, -1)  # [1, S]
        return BatchFeature(
            {
                "input_features": self._extract_mel_spectrograms(audio),
                "audio_embed_sizes": sizes,
                "input_features_mask": places < torch.tensor(sizes).view(-1, 1),
            }
        )

    def _extract_mel_spectrograms(self, audio: torch.Tensor, device: str = "cpu") -> torch.Tensor:
        """[B, samples] -> [B, frames / 2, 2 * mels]."""
        sizes = self.melspec_kwargs
        half = SAMPLING_RATE / 2
        filters = mel_filter_bank(
            sizes["n_fft"] // 2 + 1, sizes["n_mels"], 0.0, half, SAMPLING_RATE, mel_scale="htk"
        )
        window = window_function(sizes["win_length"], "hann", frame_length=sizes["n_fft"])
        mels = [
            spectrogram(
                wave.double().numpy(),
                window,
                frame_length=sizes["n_fft"],
                hop_length=sizes["hop_length"],
                power=2.0,
                mel_filters=filters,
            ).T
            for wave in audio
        ]
        logs = torch.from_numpy(np.stack(mels)).clip(min=1e-10).log10()  # [B, frames, mels]
        top = logs.amax(dim=(-2, -1), keepdim=True)  # [B, 1, 1]
        logs = torch.maximum(logs, top - 8.0) / 4 + 1  # [B, frames, mels]
        logs = logs[:, : logs.shape[1] // 2 * 2]  # [B, frames, mels]
        return logs.reshape(len(logs), -1, 2 * logs.shape[-1]).float()


class NoPhi4Images(BaseImageProcessor):
    """In the place of Phi-4-multimodal's image processor, which exists for torchvision only."""

    model_input_names = ["image_pixel_values", "image_sizes", "image_attention_mask"]

    def preprocess(self, images: Any, **settings: Any) -> BatchFeature:
        raise NotImplementedError("Phi-4-multimodal's image processor needs torchvision")


def video_stand_in(name: str, **attributes: Any) -> type[BaseVideoProcessor]:
    """A video processor called `name` that only holds the settings that processors read off it."""
    return type(name, (BaseVideoProcessor,), {"model_input_names": [], **attributes})


VIDEO_STAND_INS = {
    name: video_stand_in(name, **attributes)
    for name, attributes in {
        "InternVLVideoProcessor": {},
        "SmolVLMVideoProcessor": {"num_frames": 2, "fps": 1},
        "Qwen2VLVideoProcessor": {"merge_size": 2, "temporal_patch_size": 2},
        "Qwen3VLVideoProcessor": {"merge_size": 2, "temporal_patch_size": 2},
    }.items()
}


def _stand_in_for_torchvision() -> None:
    # `transformers.BaseVideoProcessor` is a dummy without instances; its file has the real one.
    processing_utils.transformers_module.BaseVideoProcessor = BaseVideoProcessor
    for name, stand_in in VIDEO_STAND_INS.items():
        # By a name: `register` passes over configurations of transformers' own without a word.
        video_processing_auto.VIDEO_PROCESSOR_MAPPING.register(f"tiny-{name}", stand_in)


def _register_own() -> None:
    images = image_processing_auto.IMAGE_PROCESSOR_MAPPING
    images.register("tiny-phi4", {"pil": NoPhi4Images})
    # These need no torchvision, but transformers looks for its name in their files, and finds it in
    # docstrings.
    images.register("tiny-idefics3", {"pil": Idefics3ImageProcessorPil})
    images.register("tiny-smolvlm", {"pil": SmolVLMImageProcessorPil})
    feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING.register(
        "tiny-granite", NumpyGraniteSpeechFeatureExtractor
    )


@functools.cache
def prepare() -> None:
    """Make the classes above known to transformers, and stand-ins where packages are missing."""
    _register_own()
    if find_spec("torchvision") is None:
        _stand_in_for_torchvision()
    if find_spec("num2words") is None:
        processing_smolvlm.num2words = str  # spells the number of a video's frames


def pixtral_processor() -> type[ProcessorMixin]:
    """`PixtralProcessor`, whose file wants one function of an image processor that needs torchvision;
    the PIL processor's file has the same function."""
    if find_spec("torchvision") is None:
        alike = importlib.import_module(f"{PIXTRAL}.image_processing_pil_pixtral")
        sys.modules.setdefault(f"{PIXTRAL}.image_processing_pixtral", alike)
    module = importlib.import_module(f"{PIXTRAL}.processing_pixtral")
    return module.PixtralProcessor


def load_processor(folder: Path) -> ProcessorMixin:
    """`AutoProcessor.from_pretrained`, with PIL for the images."""
    prepare()
    if '"PixtralProcessor"' in (folder / "processor_config.json").read_text():
        processor = pixtral_processor().from_pretrained(folder)
    else:
        processor = AutoProcessor.from_pretrained(folder)
    if "image_processor" in processor.get_attributes():
        # Given to AutoProcessor, `backend` would break video processors. By its file, for without
        # torchvision `transformers.AutoImageProcessor` is a dummy.
        images = image_processing_auto.AutoImageProcessor
        processor.image_processor = images.from_pretrained(folder, backend="pil")
    return processor
