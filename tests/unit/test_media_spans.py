"""Vectors among tokens: against a picture of every token drawn one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loramux.engine import media_spans
from loramux.types import MediaItem


@st.composite
def items_of_a_prompt(draw: st.DrawFn) -> tuple[list[MediaItem], int]:
    """Items whose spans alternate with text, and the length of the prompt."""
    items, at = [], 0
    for number in range(draw(st.integers(0, 3))):
        spans = []
        for _ in range(draw(st.integers(1, 3))):
            at += draw(st.integers(0, 3))
            stop = at + draw(st.integers(1, 5))
            spans.append((at, stop))
            at = stop
        items.append(MediaItem("image", f"{number}", tuple(spans), {}))
    return items, at + draw(st.integers(1, 4))


def picture(items: list[MediaItem], length: int) -> list[tuple[str, int] | None]:
    """Token -> (item, vector)."""
    tokens: list[tuple[str, int] | None] = [None] * length
    for item in items:
        places = [p for a, b in item.spans for p in range(a, b)]
        for vector, place in enumerate(places):
            tokens[place] = (item.digest, vector)
    return tokens


@given(items_of_a_prompt(), st.data())
def test_runs_are_what_stands_in_a_stretch(
    prompt: tuple[list[MediaItem], int], data: st.DataObject
) -> None:
    items, length = prompt
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    wanted = picture(items, length)
    found: list[tuple[str, int] | None] = [None] * length
    for item in media_spans.items_between(items, start, stop):
        for token, vector, count in media_spans.vectors_between(item, start, stop):
            for i in range(count):
                found[token + i] = (item.digest, vector + i)
    assert found[start:stop] == wanted[start:stop]
    assert not any(found[:start]) and not any(found[stop:])
    cut = media_spans.whole_until(items, start, stop)
    spans = [span for item in items for span in item.spans]
    assert start <= cut <= stop
    assert cut == start or not any(a < cut < b for a, b in spans)
    later = [c for c in range(cut + 1, stop + 1) if not any(a < c < b for a, b in spans)]
    assert not later, "it could have gone further"


@given(items_of_a_prompt(), st.data())
def test_content_keys_tell_media_apart(
    prompt: tuple[list[MediaItem], int], data: st.DataObject
) -> None:
    items, length = prompt
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    key = media_spans.content_key(items, start, stop)
    assert bool(key) == any(picture(items, length)[start:stop])
    others = [MediaItem("image", item.digest + "x", item.spans, {}) for item in items]
    assert (key == media_spans.content_key(others, start, stop)) == (not key)


def test_items_are_taken_in_the_order_of_their_tokens() -> None:
    late, early = MediaItem("image", "a", ((5, 7),), {}), MediaItem("audio", "b", ((1, 2),), {})
    assert media_spans.in_order([late, early]) == (early, late)
