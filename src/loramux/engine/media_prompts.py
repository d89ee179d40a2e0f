"""Text and media made into prompts by the model's processor; a text model has none, and takes none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from loramux.errors import InvalidField
from loramux.types import MediaPrompt

if TYPE_CHECKING:
    from loramux.media import Audio, Image, Video

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


class MediaPrompts:
    """Methods block, and may be called from any thread."""

    def __init__(self, processor: Processor | None = None):
        self._processor = processor

    @property
    def modalities(self) -> frozenset[str]:
        """What a request may carry beside text; empty for a text model."""
        return frozenset() if self._processor is None else self._processor.modalities

    def prepare(self, prompt: str | Sequence[int], media: Sequence[Media]) -> MediaPrompt:
        """A text or tokens whose placeholders stand for `media`, those of each modality in order.

        Raises InvalidField where they do not fit together."""
        return self._required().prepare(prompt, media)

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
        return self._required().prepare_chat(
            messages,
            media,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            template_kwargs=template_kwargs,
        )

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

    def _required(self) -> Processor:
        if self._processor is None:
            raise InvalidField("this is a text model: it takes no media", field="prompt")
        return self._processor
