"""Text that grows token by token, and where it stops."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loramux.engine.answers import AnswerWriter
from loramux.engine.plan import Sampled
from loramux.engine.sequence import Sequence
from loramux.errors import InvalidField
from loramux.models.text import Detokenizer, TextProcessor
from loramux.types import Delta, Request, SamplingParams, TokenLogprob, TokenLogprobs
from tiny import EOS, tokenizer

TEXT = TextProcessor(tokenizer())


def _write(text: str | list[int], limit: int = 100, **params: object) -> list[Delta]:
    ids = TEXT.encode(text, add_special_tokens=False) if isinstance(text, str) else text
    settings = SamplingParams(**{"max_tokens": 1000, **params})  # type: ignore[arg-type]
    sequence = Sequence(0, Request("r", (5, 6), settings), 0, 0, queued_at=0.0)
    writer = AnswerWriter(TEXT, frozenset([EOS]), limit)
    writer.open(sequence)
    deltas = []
    for token in ids:
        sequence.tokens.append(token)
        if (delta := writer.add(sequence, Sampled(token))) is not None:
            deltas.append(delta)
            if delta.finished:
                break
    return deltas


def _text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), st.text(max_size=10))
def test_pieces_add_up_to_the_text(text: str, prompt: str) -> None:
    assume("<" not in text)  # it may spell a special token, which is left out
    detokenizer = Detokenizer(
        TEXT, TEXT.encode(prompt, add_special_tokens=False), skip_special_tokens=True
    )
    pieces = [detokenizer.add(t) for t in TEXT.encode(text, add_special_tokens=False)]
    assert "".join(pieces) + detokenizer.flush() == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 319), max_size=30), st.lists(st.integers(0, 319), max_size=8))
def test_any_tokens_are_written_as_a_window_writes_them(ids: list[int], prompt: list[int]) -> None:
    for skip in (False, True):
        stream = Detokenizer(TEXT, prompt, skip_special_tokens=skip)
        window = Detokenizer(TEXT, prompt, skip_special_tokens=skip)
        window._use_window()
        written = ["".join([d.add(t) for t in ids]) + d.flush() for d in (stream, window)]
        assert written[0] == written[1]


def test_without_text() -> None:
    deltas = _write("abc", max_tokens=3, detokenize=False, logprobs=0)
    assert [(d.text, len(d.token_ids)) for d in deltas] == [("", 1)] * 3
    assert deltas[-1].finish_reason == "length"
    deltas = _write([50, EOS], detokenize=False, include_stop_str_in_output=True)
    assert (deltas[-1].finish_reason, _text(deltas)) == ("stop", "")
    with pytest.raises(InvalidField, match="detokenize must be True where stop strings"):
        SamplingParams(detokenize=False, stop=["x"])


def test_half_characters_are_not_given_out() -> None:
    pieces = [delta.text for delta in _write("aé😀b")]
    assert [piece for piece in pieces if piece] == ["a", "é", "😀", "b"]


@pytest.mark.parametrize("include", [False, True])
def test_stop_string(include: bool) -> None:
    deltas = _write("hello END world", stop=["END", "world"], include_stop_str_in_output=include)
    assert _text(deltas) == ("hello END" if include else "hello ")
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "END")


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab ", min_size=1, max_size=20),
    st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_nothing_of_a_stop_string_ever_leaks(text: str, stops: list[str]) -> None:
    deltas = _write(text, stop=stops)
    # The answer ends with the character that completes the first stop string.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    if not ends:
        assert not deltas or not deltas[-1].finished
        return
    first_end = min(ends)[0]
    start = min(begin for end, begin in ends if end == first_end)
    assert _text(deltas) == text[:start]
    assert deltas[-1].finish_reason == "stop"


def test_end_token_and_ignore_eos() -> None:
    ids = [*TEXT.encode("ab", add_special_tokens=False), EOS, 50]
    deltas = _write(ids)
    assert (_text(deltas), deltas[-1].finish_reason, deltas[-1].stop_reason) == ("ab", "stop", None)
    assert [t for d in deltas for t in d.token_ids] == ids[:3]
    assert not _write(ids, ignore_eos=True)[-1].finished


def test_stop_token_ids() -> None:
    ids = TEXT.encode("abc", add_special_tokens=False)
    deltas = _write(ids, stop_token_ids=[ids[1]])
    assert (_text(deltas), deltas[-1].stop_reason) == ("a", ids[1])


def test_length() -> None:
    deltas = _write("abcdef", max_tokens=3)
    assert (_text(deltas), deltas[-1].finish_reason) == ("abc", "length")
    assert _write("abcdef", limit=6)[-1].finish_reason == "length"
    # A possible stop string that was held back comes out when the answer ends.
    assert _text(_write("ab", max_tokens=2, stop=["bx"])) == "ab"


def test_min_tokens_delays_stop_strings() -> None:
    assert _text(_write("aXbXc", stop=["X"], min_tokens=3)) == "aXb"


def test_logprobs_carry_text() -> None:
    settings_ = SamplingParams(logprobs=1)
    sequence = Sequence(0, Request("r", (5,), settings_), 0, 0, queued_at=0.0)
    writer = AnswerWriter(TEXT, frozenset(), 50)
    writer.open(sequence)
    [token] = TEXT.encode("z", add_special_tokens=False)
    sequence.tokens.append(token)
    item = TokenLogprob(token, -0.5, 1)
    delta = writer.add(sequence, Sampled(token, TokenLogprobs(item, (item,))))
    assert delta is not None and delta.logprobs is not None
    assert delta.logprobs[0].chosen.decoded_token == "z"
    assert delta.logprobs[0].top[0].decoded_token == "z"
