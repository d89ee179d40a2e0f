"""The stock processor of a multimodal checkpoint, also where packages that parts of it need are missing.

transformers' own loading gives up where torchvision or torchaudio cannot be imported, though images have
processors by PIL and sounds need neither. The parts are loaded one by one here and given to the model's
own class; nothing is registered with transformers, and what is put in place for an import is taken away.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from transformers import (
    AutoFeatureExtractor,
    AutoTokenizer,
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PretrainedConfig,
    ProcessorMixin,
    TokenizersBackend,
)
from transformers.models.auto.auto_mappings import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.utils import PushToHubMixin

from loramux.errors import ConfigError, LoramuxError, UnsupportedModel
from loramux.models.granite_sounds import granite_features
from loramux.types import Modality

PACKAGES = ("torchvision", "torchaudio", "num2words", "librosa")
PARTS: dict[str, Modality] = {
    "image_processor": "image",
    "video_processor": "video",
    "feature_extractor": "audio",
    "audio_processor": "audio",
}


@dataclass(frozen=True)
class StockProcessor:
    """`processor` is of transformers' class for the model. `missing` are modalities that the model
    takes, but not on this machine, with the package that they need."""

    processor: ProcessorMixin
    missing: Mapping[Modality, str]


class AbsentPart(PushToHubMixin):  # as a processor's parts are, which it writes into its log
    """Stands where a processor reads settings off a part that cannot be had; it processes nothing."""

    def __init__(self, merge_size: int | None):
        self.merge_size = merge_size

    def to_dict(self) -> dict[str, Any]:
        return {"absent": True}


def load_stock(source: str, revision: str | None, hf_config: PretrainedConfig) -> StockProcessor:
    """Raises ConfigError where `source` has no processor that can be read, UnsupportedModel where none
    of its parts for media can be had."""
    try:
        return _Loading(source, revision, hf_config).load()
    except LoramuxError:
        raise
    except Exception as error:  # of a checkpoint's files, each reader raises kinds of its own
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ConfigError(
            f"no processor can be read from {source!r}: {line}",
            field="model",
            remedy="the folder needs the processor's files: processor_config.json or "
            "preprocessor_config.json, and the tokenizer's",
        ) from error


class _Loading:
    """One load. `missing` grows as parts turn out to lack a package."""

    def __init__(self, source: str, revision: str | None, hf_config: PretrainedConfig):
        self.source = source
        self.where: dict[str, Any] = {"revision": revision}
        self.hf_config = hf_config
        self.missing: dict[Modality, str] = {}

    def load(self) -> StockProcessor:
        kind = _class_named(self._class_name())
        settings, _ = kind.get_processor_dict(self.source, **self.where)
        parts = {name: self._part(kind, name) for name in kind.get_attributes()}
        if "video_processor" in parts and kind.__name__ == "SmolVLMProcessor":
            self._require_num2words()
        if not any(parts[name] for name in PARTS if name in parts):
            packages = " and ".join(sorted(set(self.missing.values())))
            raise UnsupportedModel(
                f"nothing that {kind.__name__} needs for media can be imported",
                field="model",
                remedy=f"install {packages}",
            )
        if self.missing:
            kind = _without_check(kind)
            merge_size = getattr(parts.get("image_processor"), "merge_size", None)
            parts = {name: part or AbsentPart(merge_size) for name, part in parts.items()}
        with _num2words_not_needed():
            processor = kind.from_args_and_dict(list(parts.values()), settings)
        return StockProcessor(processor, self.missing)

    def _class_name(self) -> str:
        """Of the processor: what the first of the checkpoint's files says that says it."""
        readers: list[Callable[[], dict[str, Any]]] = [
            lambda: ProcessorMixin.get_processor_dict(self.source, **self.where)[0],
            lambda: ImageProcessingMixin.get_image_processor_dict(self.source, **self.where)[0],
            lambda: FeatureExtractionMixin.get_feature_extractor_dict(self.source, **self.where)[0],
            lambda: get_tokenizer_config(self.source, **self.where),
        ]
        for read in readers:
            try:
                name = read().get("processor_class")
            except OSError:  # no such file
                continue
            if name is not None:
                return str(name)
        name = PROCESSOR_MAPPING_NAMES.get(self.hf_config.model_type)
        if name is None:
            raise UnsupportedModel(
                f"transformers has no processor for a {self.hf_config.model_type} model",
                field="model",
            )
        return str(name)

    def _part(self, kind: type[ProcessorMixin], name: str) -> Any:
        """A part of the processor; None, and a word in `missing`, where it cannot be had."""
        if name == "tokenizer":
            # The class that transformers itself chooses there.
            words = TokenizersBackend if kind.__name__ == "PixtralProcessor" else AutoTokenizer
            return words.from_pretrained(self.source, **self.where)
        modality = PARTS.get(name)
        if modality is None:
            raise UnsupportedModel(f"{kind.__name__} has a part {name!r}, which is not known here")
        try:
            return self._load_part(kind, modality)
        except ImportError as error:
            package = next((p for p in PACKAGES if p in str(error)), None)
            if package is None:
                raise
            self.missing[modality] = package
            return None

    def _load_part(self, kind: type[ProcessorMixin], modality: Modality) -> Any:
        if kind.__name__ == "GraniteSpeechProcessor":
            return granite_features().from_pretrained(self.source, **self.where)
        if modality == "audio":
            return AutoFeatureExtractor.from_pretrained(self.source, **self.where)
        if _has("torchvision"):
            if modality == "video":
                return AutoVideoProcessor.from_pretrained(self.source, **self.where)
            # The configuration says it where the files name a class that is not there.
            return AutoImageProcessor.from_pretrained(
                self.source, config=self.hf_config, **self.where
            )
        if modality == "video":
            raise ImportError("video processors need torchvision")
        return self._pil_images().from_pretrained(self.source, **self.where)

    def _pil_images(self) -> type[ImageProcessingMixin]:
        """The image processor's class that works with PIL.

        From its own file: for some models transformers takes the class for one that needs torchvision.
        """
        settings, _ = ImageProcessingMixin.get_image_processor_dict(self.source, **self.where)
        name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
        name = name.replace("FeatureExtractor", "ImageProcessor")
        name = name.removesuffix("Fast").removesuffix("Pil")
        named = [
            names for names in IMAGE_PROCESSOR_MAPPING_NAMES.values() if name in names.values()
        ]
        # As transformers: the model's own where no file names a class that exists.
        own = IMAGE_PROCESSOR_MAPPING_NAMES.get(self.hf_config.model_type, {})
        wanted = (named[0] if named else own).get("pil")
        holders = [k for k, v in IMAGE_PROCESSOR_MAPPING_NAMES.items() if v.get("pil") == wanted]
        found = _import_class(wanted, holders, "image_processing_pil") if wanted else None
        if found is None:
            raise ImportError(f"{name or 'the image processor'} needs torchvision")
        return found

    def _require_num2words(self) -> None:
        """It spells the number of a video's frames."""
        if not _has("num2words"):
            self.missing.setdefault("video", "num2words")


def _has(package: str) -> bool:
    return find_spec(package) is not None


def _module(model_type: str, kind: str) -> ModuleType:
    folder = model_type_to_module_name(model_type)
    return importlib.import_module(f"transformers.models.{folder}.{kind}_{folder}")


def _import_class(name: str, model_types: list[str], kind: str) -> Any:
    """The class `name` from the first file of its `kind` that has it; None where there is none."""
    for model_type in model_types:
        try:
            module = _processing(model_type) if kind == "processing" else _module(model_type, kind)
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("transformers."):
                raise
            continue  # a model that uses the class of another
        if hasattr(module, name):
            return getattr(module, name)
    return None


def _class_named(name: str) -> type[ProcessorMixin]:
    """Raises UnsupportedModel for a class that transformers does not have."""
    holders = [kind for kind, value in PROCESSOR_MAPPING_NAMES.items() if value == name]
    found = _import_class(name, holders, "processing")
    if found is None:
        raise UnsupportedModel(
            f"the checkpoint wants a {name}, which this version of transformers does not have",
            field="model",
            remedy="serve a checkpoint in transformers' own format",
        )
    return found


def _processing(model_type: str) -> ModuleType:
    """Pixtral's file wants one function of an image processor that needs torchvision. The PIL
    processor's file has the same function: for the time of the import it stands there."""
    try:
        return _module(model_type, "processing")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
    alike = _module(model_type, "image_processing_pil")
    wanted = alike.__name__.replace("image_processing_pil_", "image_processing_")
    sys.modules[wanted] = alike
    try:
        return _module(model_type, "processing")
    finally:
        del sys.modules[wanted]


def _without_check(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """`kind`, which takes an `AbsentPart` for a part."""
    unchecked = {"check_argument_for_proper_class": lambda self, name, part: type(part)}
    return type(kind.__name__, (kind,), {**unchecked, "__module__": kind.__module__})


@contextmanager
def _num2words_not_needed() -> Iterator[None]:
    """SmolVLM's processor refuses to be made without num2words, which only its videos use."""
    module = sys.modules.get("transformers.models.smolvlm.processing_smolvlm")
    if module is None or module.num2words is not None:
        yield
        return
    module.num2words = str  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.num2words = None  # type: ignore[attr-defined]
