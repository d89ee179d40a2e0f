"""Messages with media as a chat template wants them.

Some templates write each part of a list, some take a text only, and some nothing but lists. Which it is
is found by asking the template, not by reading it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loramux.errors import InvalidField
from loramux.models.placeholders import Placeholders
from loramux.types import Modality

Message = dict[str, Any]
BEFORE, BEHIND = "jqxzk", "wqvzj"  # words that no template has of its own


@dataclass(frozen=True, slots=True)
class ContentForms:
    """What the content of a message may be for a template: a text, a list of parts, and for which
    modalities it writes a placeholder in the place of such a part."""

    text: bool
    parts: bool
    modalities: frozenset[Modality]


def forms_of(render: Callable[[list[Message]], str], placeholders: Placeholders) -> ContentForms:
    """`render` raises InvalidField for messages that the template refuses."""

    def written(content: Any) -> str:
        try:
            return render([{"role": "user", "content": content}])
        except InvalidField:
            return ""

    text = {"type": "text", "text": BEFORE}
    as_parts = written([text])
    # A template that knows only texts writes the list as Python or JSON does.
    parts = BEFORE in as_parts and "'text'" not in as_parts and '"text"' not in as_parts
    modalities: set[Modality] = set()
    for modality in placeholders.texts if parts else ():
        prompt = written([text, {"type": modality}, {"type": "text", "text": BEHIND}])
        found = [place.modality for place in placeholders.find(prompt)]
        if found == [modality] and BEFORE in prompt and BEHIND in prompt:
            modalities.add(modality)
    return ContentForms(BEFORE in written(BEFORE) or not parts, parts, frozenset(modalities))


def fit(
    messages: Sequence[Message], forms: ContentForms, placeholder: Callable[[Modality], str]
) -> list[Message]:
    """`messages`, whose content is a text or a list of parts, as a template of these forms takes them.
    Parts that become one text are joined by line ends, as a text model's are.

    Raises InvalidField for a part that is neither text nor of a modality that `placeholder` knows.
    """
    return [_fit(message, forms, placeholder) for message in messages]


def _fit(message: Message, forms: ContentForms, placeholder: Callable[[Modality], str]) -> Message:
    content = message.get("content")
    if isinstance(content, str):
        return message if forms.text else {**message, "content": [_text_part(content)]}
    if not isinstance(content, Sequence):  # an assistant's turn may have none
        return message
    texts = [_as_text(part, placeholder) for part in content]
    kinds = {part["type"] for part in content} - {"text"}
    if forms.text and not (kinds and forms.parts and kinds <= forms.modalities):
        return {**message, "content": "\n".join(texts)}
    parts = [
        {"type": part["type"]} if part["type"] in forms.modalities else _text_part(text)
        for part, text in zip(content, texts, strict=True)
    ]
    return {**message, "content": parts}


def _text_part(text: str) -> Message:
    return {"type": "text", "text": text}


def _as_text(part: Any, placeholder: Callable[[Modality], str]) -> str:
    """What stands for a part in a text."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind not in ("image", "audio", "video"):
        raise InvalidField(
            f"a content part of type {kind!r} is refused",
            field="messages",
            remedy='send parts of type "text", "image", "audio" or "video"',
        )
    return placeholder(kind)
