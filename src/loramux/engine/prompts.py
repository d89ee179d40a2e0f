"""What turns callers' words into tokens: the tokenizer, and with media the model's processor."""

from __future__ import annotations

from loramux.engine.leading import Started
from loramux.engine.media_prompts import MediaPrompts, Room
from loramux.models.text import TextProcessor


def text_processor(started: Started) -> TextProcessor:
    """The tokenizer and chat template of an engine; a multimodal model's are its processor's."""
    if started.processor is not None:
        return started.processor.text
    config = started.config
    source = config.tokenizer or config.model
    return TextProcessor.load(source, config.revision, config.chat_template)


def media_prompts(started: Started) -> MediaPrompts:
    """What makes an engine's prompts with media; without towers there are none."""
    loaded, facts = started.loaded, started.facts
    if (towers := loaded.attached.towers) is None:
        return MediaPrompts()
    room = Room.of(started.config, facts, loaded.vocab_size)
    return MediaPrompts(started.processor, towers.rope_index, room, facts.modalities)
