"""Text and media made into prompts by the model's processor; a text model has none, and takes none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from loramux.config import EngineConfig, ModelFacts
from loramux.errors import InvalidField
from loramux.types import MediaItem, MediaPrompt

RopeIndex = Callable[[Sequence[int], Sequence[MediaItem]], tuple[Any, int]]
"""Tokens and items -> (positions int32 [3, N] or None, shift), see `MediaPrompt`."""

if TYPE_CHECKING:
    from loramux.media import Audio, Image, Video
    from loramux.models.text import TextProcessor

    Media = Image | Audio | Video


class Processor(Protocol):
    """`models.processor.MediaProcessor`, as far as it is used here."""

    @property
    def modalities(self) -> frozenset[str]: ...

    def prepare(
        self, prompt: str | Sequence[int], media: Sequence[Media], add_special_tokens: bool = True
    ) -> MediaPrompt: ...

    def prepare_chat(
        self, messages: Sequence[dict[str, Any]], media: Sequence[Media], **settings: Any
    ) -> MediaPrompt: ...

    def with_text(self, text: Any) -> Processor: ...


@dataclass(frozen=True, slots=True)
class Room:
    """What the engine can do with a prompt's media."""

    vectors: int  # of one item
    span: int | None  # tokens of one image, where no step may cut it
    positions: int
    vocab: int

    @classmethod
    def of(cls, config: EngineConfig, facts: ModelFacts, vocab: int) -> Room:
        """Of a resolved config."""
        assert config.max_num_batched_tokens is not None and config.max_model_len is not None
        span = None
        if facts.encoder is not None and facts.encoder.sees_whole:
            # Beside it every other sequence may decode.
            span = max(1, config.max_num_batched_tokens - config.max_num_seqs)
        return cls(config.encoder_cache_tokens or 0, span, config.max_model_len, vocab)


class MediaPrompts:
    """Methods block, and may be called from any thread."""

    def __init__(
        self,
        processor: Processor | None = None,
        rope_index: RopeIndex | None = None,
        room: Room | None = None,
        modalities: Collection[str] | None = None,
    ):
        """`rope_index` gives a prompt's positions and shift, `room` what the engine can do with it.
        `modalities` are those of the processor, if nothing else is said."""
        self._processor = processor
        if modalities is None:
            modalities = () if processor is None else processor.modalities
        self._modalities = frozenset(modalities)
        self._rope_index = rope_index
        self._room = room

    @property
    def modalities(self) -> frozenset[str]:
        """What a request may carry beside text; empty for a text model."""
        return self._modalities

    def with_text(self, text: TextProcessor) -> MediaPrompts:
        """The same for an adapter with a chat template of its own; the tokenizer is the model's."""
        if self._processor is None:
            return self
        processor = self._processor.with_text(text)
        return MediaPrompts(processor, self._rope_index, self._room, self._modalities)

    def prepare(self, prompt: str | Sequence[int], media: Sequence[Media]) -> MediaPrompt:
        """A text or tokens whose placeholders stand for `media`, those of each modality in order.

        Raises InvalidField where they do not fit together."""
        return self._placed(self._required().prepare(prompt, media), "prompt")

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        media: Sequence[Media],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> MediaPrompt:
        """Messages whose contents are lists of parts, with `media` in the order in which they stand.

        Raises InvalidField when the chat template refuses the messages."""
        prompt = self._required().prepare_chat(
            messages,
            media,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            template_kwargs=template_kwargs,
        )
        return self._placed(prompt, "messages")

    def split(
        self, prompt: Sequence[int] | MediaPrompt
    ) -> tuple[tuple[int, ...], MediaPrompt | None]:
        """Tokens, and the prompt itself if it carries media. Raises InvalidField for media that the
        model does not take: their placeholders would be read as text."""
        if not isinstance(prompt, MediaPrompt):
            return tuple(prompt), None
        if not {item.modality for item in prompt.items} <= self.modalities:
            raise InvalidField(
                "the prompt carries media that this model does not take", field="prompt"
            )
        return prompt.token_ids, prompt if prompt.items else None

    def _placed(self, prompt: MediaPrompt, field: str) -> MediaPrompt:
        """With positions, and within what the engine can do. Raises InvalidField."""
        if not prompt.items:
            return prompt
        positions, shift = None, 0
        if self._rope_index is not None:
            positions, shift = self._rope_index(prompt.token_ids, prompt.items)
        if self._room is None:
            return replace(prompt, positions=positions, shift=shift)
        _check_room(prompt, positions, shift, self._room, field)
        # A placeholder need not be a token of the vocabulary, and its embedding is replaced.
        token_ids = tuple(t if t < self._room.vocab else 0 for t in prompt.token_ids)
        return replace(prompt, token_ids=token_ids, positions=positions, shift=shift)

    def _required(self) -> Processor:
        if self._processor is None:
            raise InvalidField("this is a text model: it takes no media", field="prompt")
        return self._processor


def _check_room(prompt: MediaPrompt, positions: Any, shift: int, room: Room, field: str) -> None:
    """Raise InvalidField for all that a prompt's media have too much of."""
    reasons, remedies = [], []
    most = max(item.num_vectors for item in prompt.items)
    if most > room.vectors:
        reasons.append(f"one item takes {most} tokens, and {room.vectors} are encoded at once")
        remedies.append("encoder_cache_tokens")
    longest = max(stop - start for item in prompt.items for start, stop in item.spans)
    if room.span is not None and longest > room.span:
        reasons.append(f"one image takes {longest} tokens, and a step has room for {room.span}")
        remedies.append("max_num_batched_tokens")
    last = max(len(prompt.token_ids) + shift, 0 if positions is None else int(positions.max()))
    if positions is not None and last >= room.positions:
        reasons.append(f"its media reach position {last} of a context of {room.positions}")
        remedies.append("max_model_len")
    if reasons:
        raise InvalidField(
            f"the prompt cannot be served: {'; '.join(reasons)}",
            field=field,
            remedy=f"send smaller media, or have the operator raise {', '.join(remedies)}",
        )
