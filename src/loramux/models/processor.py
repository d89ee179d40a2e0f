"""Prompts with images, sounds and videos: which tokens they are, and what their encoders are given."""

from __future__ import annotations

import copy
import functools
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import PIL.Image
from transformers import PretrainedConfig

from loramux.errors import InvalidField, UnsupportedModel
from loramux.media import Audio, Image, Video
from loramux.models.chat_parts import ContentForms, Message, fit, forms_of
from loramux.models.item_cache import ItemCache
from loramux.models.media_items import ItemProcessor, Media, beside_others, modality_of
from loramux.models.placeholders import Placeholders, expanded_ids, expanded_text, spans_of
from loramux.models.stock_processor import PARTS, StockProcessor, load_stock
from loramux.models.text import TextProcessor, read_template
from loramux.types import MediaItem, MediaPrompt, Modality

logger = logging.getLogger(__name__)

CACHE_BYTES = 256 << 20
MODALITIES: tuple[Modality, ...] = ("image", "audio", "video")
NAMES: dict[Modality, str] = {"image": "images", "audio": "sounds", "video": "videos"}


def load_processor(
    source: str,
    revision: str | None,
    hf_config: PretrainedConfig,
    chat_template: str | None = None,
    *,
    cache_bytes: int = CACHE_BYTES,
) -> MediaProcessor:
    """The processor of the multimodal checkpoint `source`, whose configuration is `hf_config`. A
    `chat_template` (a text or a file) goes before the checkpoint's own.

    Raises ConfigError where its files cannot be read, UnsupportedModel where it cannot be used: for lack
    of a package, or because it makes prompts in a way that is not known here.
    """
    stock = load_stock(source, revision, hf_config)
    template = read_template(chat_template) or _own_template(stock)
    text = TextProcessor(stock.processor.tokenizer, template)
    processor = MediaProcessor(stock, text, hf_config, ItemCache(cache_bytes))
    _prove(processor)
    return processor


def _own_template(stock: StockProcessor) -> str | None:
    template = stock.processor.chat_template
    return template.get("default") if isinstance(template, dict) else template


class MediaProcessor:
    """The processor of one model. Safe to call from several threads.

    `text` is the processor's own tokenizer with the model's chat template: prompts without media have to
    go through it as well. `refusals` are modalities that the model takes, but not here, with the reason.
    """

    def __init__(
        self,
        stock: StockProcessor,
        text: TextProcessor,
        hf_config: PretrainedConfig,
        cache: ItemCache,
    ):
        self.text = text
        self.stock = stock.processor
        self.refusals: dict[Modality, str] = {
            modality: f"their processor needs {package}, which is not installed here"
            for modality, package in stock.missing.items()
        }
        self._hf_config = hf_config
        self._tokens = {m: token for m in MODALITIES if (token := self._token(m)) is not None}
        ids = {
            m: token_id
            for m, token in self._tokens.items()
            if (token_id := self._id(token)) is not None
        }
        # Of what is not taken, only tokens are refused: <video> may be anybody's text.
        texts = {m: token for m, token in self._tokens.items() if m in self.modalities or m in ids}
        self._placeholders = Placeholders(texts, ids)
        vector_ids = {m: self._vector_ids(m) for m in self.modalities}
        self._all_vector_ids = frozenset(i for found in vector_ids.values() for i in found)
        self._items = ItemProcessor(stock, text, texts, vector_ids, cache)

    def with_text(self, text: TextProcessor) -> MediaProcessor:
        """The same processor, which renders conversations by the chat template of `text`."""
        made = copy.copy(self)
        made.text = text
        made.__dict__.pop("_forms", None)
        return made

    # --- what the model takes ------------------------------------------------------------------

    @property
    def modalities(self) -> frozenset[Modality]:
        """Of which prompts may have items."""
        return frozenset(self._tokens) - frozenset(self.refusals)

    def placeholder(self, modality: Modality) -> str:
        """The text that stands for one item in a prompt, with the tags that belong around it. Raises
        InvalidField where the model does not take the modality."""
        self._check_taken(modality, "messages")
        first, last = self._tags(modality)
        return f"{first}{self._placeholders.texts[modality]}{last}"

    def _check_taken(self, modality: Modality, field: str) -> None:
        if modality in self.modalities:
            return
        reason = self.refusals.get(modality)
        if reason is not None:
            raise InvalidField(
                f"the model takes {NAMES[modality]}, but {reason}",
                field=field,
                remedy="ask the operator for it, or send something else",
            )
        taken = " and ".join(NAMES[m] for m in MODALITIES if m in self.modalities)
        raise InvalidField(f"the model takes {taken}, but no {NAMES[modality]}", field=field)

    def _token(self, modality: Modality) -> str | None:
        """What a prompt has for an item. None: the model's processor does not know the modality."""
        parts = {part for part, its in PARTS.items() if its == modality}
        if not parts & set(self.stock.get_attributes()):
            return None
        token = getattr(self.stock, f"{modality}_token", None)
        return token if isinstance(token, str) else None

    def _id(self, token: str) -> int | None:
        ids = self.text.encode(token, add_special_tokens=False)
        return ids[0] if len(ids) == 1 else None

    def _vector_ids(self, modality: Modality) -> list[int]:
        """Tokens that may stand for a vector of an item. Some models have an image's for a video's."""
        named: list[Modality] = [modality, "image"] if modality == "video" else [modality]
        found = [self._configured_id(m) for m in named]
        if not any(i is not None for i in found):
            found = [self._id(self._token(m) or "") for m in named]
        return [i for i in found if i is not None]

    def _configured_id(self, modality: Modality) -> int | None:
        inner = {"image": "vision_config", "audio": "audio_config"}.get(modality, "")
        for part in ("", "thinker_config", inner):
            config = getattr(self._hf_config, part, None) if part else self._hf_config
            for name in (f"{modality}_token_id", f"{modality}_token_index"):
                if isinstance(value := getattr(config, name, None), int):
                    return value
        return None

    def _tags(self, modality: Modality) -> tuple[str, str]:
        """What chat templates write around a placeholder, where the processor does not."""
        kind = "audio" if modality == "audio" else "vision"
        config = getattr(self._hf_config, "thinker_config", self._hf_config)
        ids = [getattr(config, f"{kind}_{end}_token_id", None) for end in ("start", "end")]
        if all(isinstance(i, int) for i in ids):
            first, last = self.text.tokenizer.convert_ids_to_tokens(ids)
            return first, last
        first, last = (getattr(self.stock, f"{kind}_{end}_token", "") for end in ("bos", "eos"))
        return first, last

    # --- prompts -------------------------------------------------------------------------------

    def prepare(
        self,
        prompt: str | Sequence[int],
        media: Sequence[Media],
        add_special_tokens: bool = True,
        *,
        field: str = "prompt",
    ) -> MediaPrompt:
        """Prompt tokens exactly as the model's own processor makes them, and an item for each of
        `media`, in the order of the prompt.

        `prompt` is text or tokens with one placeholder an item; the i-th placeholder of a modality is
        the i-th item of that modality. Tokens get no special tokens, and around an item they stay as
        they are. Positions are left to the model. Raises InvalidField and BadMedia for `field`.
        """
        for item in media:
            self._check_taken(modality_of(item), field)
        places = self._placeholders.find(prompt)
        self._check_counts([p.modality for p in places], [modality_of(i) for i in media], field)
        processed = [(item, self._items.process(item, field)) for item in media]
        queues = {m: iter([p for p in processed if modality_of(p[0]) == m]) for m in MODALITIES}
        ordered = [next(queues[place.modality]) for place in places]
        expansions = [made.expansion for _, made in ordered]
        if isinstance(prompt, str):
            text = expanded_text(prompt, places, expansions)
            token_ids = self.text.encode(text, add_special_tokens=add_special_tokens)
        else:
            token_ids = expanded_ids(prompt, places, expansions)
        spans = spans_of(token_ids, expansions, self._all_vector_ids)
        if spans is None:
            raise InvalidField(
                "the prompt has tokens that stand for media besides its placeholders",
                field=field,
                remedy="write one placeholder for each item and nothing else of it",
            )
        items = [
            MediaItem(modality_of(item), self._items.digest(item), runs, made.inputs)
            for (item, made), runs in zip(ordered, spans, strict=True)
        ]
        return MediaPrompt(tuple(token_ids), beside_others(items, self._hf_config.model_type))

    def _check_counts(
        self, placed: Iterable[Modality], given: Iterable[Modality], field: str
    ) -> None:
        places, items = Counter(placed), Counter(given)
        if places == items:
            return
        counts = "; ".join(
            f"{NAMES[m]}: {places[m]} in the prompt, {items[m]} given"
            for m in MODALITIES
            if places[m] or items[m]
        )
        texts = " or ".join(self._placeholders.texts[m] for m in MODALITIES if m in self.modalities)
        raise InvalidField(
            f"placeholders and media do not match ({counts})",
            field=field,
            remedy=f"write one placeholder for each item ({texts})",
        )

    # --- conversations -------------------------------------------------------------------------

    def prepare_chat(
        self, messages: Sequence[Message], media: Sequence[Media], **settings: Any
    ) -> MediaPrompt:
        """The prompt of a conversation. `settings` are those of `TextProcessor.render_text`."""
        text = self.render(messages, **settings)
        return self.prepare(text, media, self.adds_special_tokens(text), field="messages")

    def render(self, messages: Sequence[Message], **settings: Any) -> str:
        """Messages, whose content is a text or a list of parts {"type": "text", "text": ...},
        {"type": "image"}, {"type": "audio"} and {"type": "video"}, as the chat template writes them.

        Raises InvalidField where template and messages disagree or the model does not take a part.
        """
        fitting = fit(messages, self._forms, self.placeholder)
        return self.text.render_text(fitting, **settings)

    def adds_special_tokens(self, rendered: str) -> bool:
        """Whether a rendered conversation still wants the tokenizer's special tokens: as with stock
        processors, unless the template has written the first one."""
        first = self.text.tokenizer.bos_token
        return first is None or not rendered.startswith(first)

    @functools.cached_property
    def _forms(self) -> ContentForms:
        return forms_of(lambda messages: self.text.render_text(messages), self._placeholders)

    # --- proof ---------------------------------------------------------------------------------

    def stock_ids(self, prompt: str, media: Sequence[Media]) -> list[int]:
        """The tokens that the stock processor makes of a whole prompt."""
        ids: list[int] = self._items.call(prompt, media)["input_ids"][0].tolist()
        return ids


def _prove(processor: MediaProcessor) -> None:
    """Compare, for each modality, a prompt with two items with what the stock processor makes of it. A
    modality that fails is taken no longer.

    Raises UnsupportedModel where none is left.
    """
    name = type(processor.stock).__name__
    for modality in processor.modalities:
        reason = _differs(processor, modality)
        if reason is not None:
            logger.warning("%s of this model are not served: %s", NAMES[modality], reason)
            processor.refusals[modality] = reason
    if not processor.modalities:
        reasons = [f"{NAMES[m]}: {reason}" for m, reason in processor.refusals.items()]
        raise UnsupportedModel(
            f"{name} cannot be served ({'; '.join(reasons) or 'no placeholder for media is known'})",
            field="model",
        )


def _differs(processor: MediaProcessor, modality: Modality) -> str | None:
    """Why prompts with media of a modality cannot be made here; None if they can."""
    placeholder = processor.placeholder(modality)
    prompt = f"look:\n\n{placeholder}\n\nand {placeholder}?"
    media = _samples(modality)
    try:
        theirs = processor.stock_ids(prompt, media)
        ours = processor.prepare(prompt, media).token_ids
    except Exception as error:  # a stock processor may raise anything
        return "their processor fails: " + (" ".join(str(error).split())[:200] or repr(error))
    if list(ours) != theirs:
        return "their processor changes more of a prompt than its placeholders"
    return None


def _samples(modality: Modality) -> list[Media]:
    """Two that differ in size."""
    if modality == "audio":
        waves = [np.sin(np.arange(count) / 9).astype(np.float32) for count in (4800, 11200)]
        return [Audio(wave, 16000, f"proof {i}") for i, wave in enumerate(waves)]
    sizes = [(96, 64), (64, 128)]
    pictures = [PIL.Image.new("RGB", size, (40, 90, 160)) for size in sizes]
    if modality == "image":
        return [Image(picture, f"proof {i}") for i, picture in enumerate(pictures)]
    return [Video((picture,) * 4, f"proof {i}") for i, picture in enumerate(pictures)]
