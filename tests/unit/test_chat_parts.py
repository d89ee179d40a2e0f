"""Messages with media for templates of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loramux.errors import InvalidField
from loramux.models.chat_parts import ContentForms, fit, forms_of
from loramux.models.placeholders import Placeholders
from loramux.models.text import TextProcessor
from tiny import tokenizer

TAGS = {"image": "<image>", "audio": "<audio>"}
PLACEHOLDERS = Placeholders(TAGS, {})  # type: ignore[arg-type]

TURN = "{% for m in messages %}<{{ m.role }}>"
END = "\n{% endfor %}"
PARTS = (
    "{% for p in m.content %}{% if p.type == 'image' %}<image>"
    "{% elif p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
)
# name -> the template, and what it takes: a text, lists, and for which modalities.
TEMPLATES: dict[str, tuple[str, tuple[bool, bool, set[str]]]] = {
    "texts": (TURN + "{{ m.content }}" + END, (True, False, set())),
    "texts, put together": (TURN + "{{ m.content + '.' }}" + END, (True, False, set())),
    "texts, as JSON": (TURN + "{{ m.content | tojson }}" + END, (True, False, set())),
    "lists": (TURN + PARTS + END, (False, True, {"image"})),
    "both": (
        TURN
        + "{% if m.content is string %}{{ m.content }}{% else %}"
        + PARTS
        + "{% endif %}"
        + END,
        (True, True, {"image"}),
    ),
    "images first": (
        TURN
        + "{% for p in m.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
        "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}"
        + END,
        (False, True, {"image"}),
    ),
    "lists of texts": (
        TURN + "{% for p in m.content %}{{ p.text }}{% endfor %}" + END,
        (False, True, set()),
    ),
}

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "this"},
            {"type": "image"},
            {"type": "audio"},
            {"type": "text", "text": "is?"},
        ],
    },
    {"role": "user", "content": [{"type": "text", "text": "or"}, {"type": "text", "text": "not"}]},
]


def renderer(template: str) -> Callable[[list[dict[str, Any]]], str]:
    return TextProcessor(tokenizer(), template).render_text


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_takes_is_found(name: str) -> None:
    template, (text, parts, modalities) = TEMPLATES[name]
    forms = forms_of(renderer(template), PLACEHOLDERS)
    assert forms == ContentForms(text, parts, frozenset(modalities))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_of_a_conversation_is_lost(name: str) -> None:
    template, _ = TEMPLATES[name]
    render = renderer(template)
    messages = fit(MESSAGES, forms_of(render, PLACEHOLDERS), lambda modality: TAGS[modality])
    prompt = render(messages)
    for word in ("be brief", "this", "is?", "or", "not"):
        assert prompt.count(word) == 1, prompt
    assert prompt.count("<image>") == prompt.count("<audio>") == 1
    assert "type" not in prompt


def test_order_within_a_text_is_that_of_the_parts() -> None:
    forms = ContentForms(True, False, frozenset())
    made = fit(MESSAGES, forms, lambda modality: TAGS[modality])
    assert [message["content"] for message in made] == [
        "be brief",
        "this\n<image>\n<audio>\nis?",
        "or\nnot",
    ]


def test_turns_without_content_stay_as_they_are() -> None:
    turn = {"role": "assistant", "content": None, "name": "x"}
    for forms in (ContentForms(True, True, frozenset()), ContentForms(False, True, frozenset())):
        assert fit([turn], forms, lambda modality: "") == [turn]


@pytest.mark.parametrize("part", [{"type": "file"}, {"type": "text"}, "words", {"text": "x"}, {}])
def test_other_parts_are_refused(part: Any) -> None:
    forms = ContentForms(True, True, frozenset())
    with pytest.raises(InvalidField, match="content part"):
        fit([{"role": "user", "content": [part]}], forms, lambda modality: "")


def test_a_template_that_refuses_lists_takes_texts() -> None:
    refusing = "{% if m.content is not string %}{{ raise_exception('no') }}{% endif %}"
    template = TURN + refusing + "{{ m.content }}" + END
    forms = forms_of(renderer(template), PLACEHOLDERS)
    assert forms == ContentForms(True, False, frozenset())
