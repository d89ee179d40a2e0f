"""One image, sound or video through the stock processor, by itself.

An item's inputs must not depend on its neighbours in a prompt: they are encoded once and used again. So
each is processed alone, and nothing of another item's size is in its padding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import transformers
from transformers import BatchFeature

from loramux.errors import BadMedia, LoramuxError
from loramux.media import Audio, Image, Video
from loramux.models.encoders import PHI4_MODE
from loramux.models.item_cache import ItemCache, ProcessedItem
from loramux.models.placeholders import Expansion
from loramux.models.resample import resample
from loramux.models.stock_processor import PARTS, StockProcessor
from loramux.models.text import TextProcessor
from loramux.types import MediaItem, Modality

Media = Image | Audio | Video

# What processors return about the prompt's text.
OF_THE_TEXT = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "text_replacement_offsets",
}


def modality_of(item: Media) -> Modality:
    return "image" if isinstance(item, Image) else "audio" if isinstance(item, Audio) else "video"


class ItemProcessor:
    """Processes items and remembers them. Safe to call from several threads.

    `placeholders` has the text that stands for an item, `vector_ids` the tokens that stand for a vector
    of a modality, likeliest first.
    """

    def __init__(
        self,
        stock: StockProcessor,
        text: TextProcessor,
        placeholders: Mapping[Modality, str],
        vector_ids: Mapping[Modality, Sequence[int]],
        cache: ItemCache,
    ):
        self.stock = stock.processor
        self.cache = cache
        self._text = text
        self._placeholders = placeholders
        self._vector_ids = vector_ids
        self._identities = {m: _identity(self.stock, m) for m in placeholders}

    def digest(self, item: Media) -> str:
        """Hex sha256 of the content's digest and of how it is processed."""
        modality = modality_of(item)
        words = [self._identities[modality], modality, item.digest]
        return hashlib.sha256("\0".join(words).encode()).hexdigest()

    def process(self, item: Media, field: str) -> ProcessedItem:
        """Raises BadMedia, for `field`, where the model's processor cannot take the item."""
        digest = self.digest(item)
        processed = self.cache.get(digest)
        if processed is None:
            processed = self._process(item, field)
            self.cache.put(digest, processed)
        return processed

    def call(self, text: str, items: Sequence[Media]) -> BatchFeature:
        """What the stock processor makes of one prompt, which has a placeholder for each item."""
        settings: dict[str, Any] = {
            "text_kwargs": {"padding": False, "return_text_replacement_offsets": True}
        }
        images = [item.pixels for item in items if isinstance(item, Image)]
        audio = [self._samples(item) for item in items if isinstance(item, Audio)]
        videos = [_frames(item) for item in items if isinstance(item, Video)]
        if images:
            settings["images"] = images
        if audio:
            settings |= {"audio": audio, "audio_kwargs": {"sampling_rate": self._rate}}
        if videos:
            # The frames that came are those to see. Of a video three pixels high a processor could
            # not tell which axis has the channels.
            as_they_are = {"do_sample_frames": False, "input_data_format": "channels_last"}
            settings |= {"videos": [videos], "videos_kwargs": as_they_are}
        return self.stock(text=[text], return_tensors="pt", **settings)

    def _process(self, item: Media, field: str) -> ProcessedItem:
        modality = modality_of(item)
        try:
            made = self.call(self._placeholders[modality], [item])
        except LoramuxError as error:
            error.field = field
            raise
        except Exception as error:  # on strange sizes processors raise nearly every kind
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise BadMedia(
                f"the model's processor refuses the {modality}: {reason}", field=field
            ) from error
        expansion = self._expansion(modality, made)
        if not expansion.num_vectors:
            raise BadMedia(f"the {modality} is too short or small for this model", field=field)
        inputs = {name: value for name, value in made.items() if name not in OF_THE_TEXT}
        return ProcessedItem(inputs, expansion)

    def _expansion(self, modality: Modality, made: BatchFeature) -> Expansion:
        candidates = self._vector_ids[modality]
        offsets = made.get("text_replacement_offsets")
        if offsets:
            text = str(offsets[0][0]["replacement"])
        else:  # a processor that repeats the placeholder and does not say so
            ids = made["input_ids"][0].tolist()
            count = max(ids.count(candidate) for candidate in candidates)
            text = self._placeholders[modality] * count
        token_ids = tuple(self._text.encode(text, add_special_tokens=False))
        vector_id = next((token for token in candidates if token in token_ids), candidates[0])
        return Expansion(text, token_ids, vector_id)

    @property
    def _extractor(self) -> Any:
        return getattr(self.stock, "audio_processor", None) or self.stock.feature_extractor

    @property
    def _rate(self) -> int:
        return int(self._extractor.sampling_rate)

    def _samples(self, item: Audio) -> np.ndarray:
        """float32 [S] at the model's rate. Raises BadMedia where the processor would cut the end off."""
        limit = getattr(self._extractor, "n_samples", None)
        if limit is not None and item.seconds > limit / self._rate:
            raise BadMedia(
                f"the sound lasts {item.seconds:.1f} s, and this model hears {limit / self._rate:g} s",
                remedy="send it in parts",
            )
        return resample(item.samples, item.rate, self._rate)


def beside_others(items: Sequence[MediaItem], model_type: str) -> tuple[MediaItem, ...]:
    """The items of one prompt, each as its encoder takes it beside the others: Phi-4 has other weights
    for a sound where there is an image too. In other models company changes nothing."""
    seen = any(item.modality == "image" for item in items)
    if model_type != "phi4_multimodal" or not seen:
        return tuple(items)
    return tuple(_beside_image(item) if item.modality == "audio" else item for item in items)


def _beside_image(sound: MediaItem) -> MediaItem:
    digest = hashlib.sha256(f"{sound.digest}\0beside an image".encode()).hexdigest()
    return replace(sound, digest=digest, inputs={**sound.inputs, PHI4_MODE: "vision"})


def _frames(item: Video) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in item.frames])  # [T, H, W, 3] uint8


def _identity(processor: Any, modality: Modality) -> str:
    """Of how items of a modality are processed: equal ones make the same of the same item."""
    names = [name for name, its in PARTS.items() if its == modality and hasattr(processor, name)]
    parts = {name: getattr(processor, name) for name in names}
    settings = {name: [type(part).__name__, part.to_dict()] for name, part in parts.items()}
    own = {
        name: value
        for name, value in vars(processor).items()
        if isinstance(value, (str, int, float)) and name != "chat_template"
    }
    words = [transformers.__version__, type(processor).__name__, own, settings]
    return hashlib.sha256(json.dumps(words, sort_keys=True, default=str).encode()).hexdigest()
