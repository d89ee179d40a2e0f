"""The error tree: drawn, picklable, on one line."""

from __future__ import annotations

import pickle

import pytest

from loramux import errors
from loramux.errors import AdapterConflict, AdapterRejected, LoramuxError, Overloaded, QuotaReached


def _tree(kind: type[LoramuxError]) -> list[type[LoramuxError]]:
    return [kind, *(sub for child in kind.__subclasses__() for sub in _tree(child))]


def _make(kind: type[LoramuxError]) -> LoramuxError:
    if kind is AdapterRejected:
        return AdapterRejected("a", ["one", "two"], remedy="do")
    if kind is AdapterConflict:
        return AdapterConflict("it went wrong", current_digest="d", remedy="do")
    if kind is QuotaReached:
        return QuotaReached("it went wrong", adapter="a", limit="weight", retry_after_s=2.5)
    return kind("it went wrong", **({} if kind is Overloaded else {"field": "f", "remedy": "do"}))


@pytest.mark.parametrize("kind", _tree(LoramuxError), ids=lambda k: k.__name__)
def test_pickle_round_trip_and_drawing(kind: type[LoramuxError]) -> None:
    error = _make(kind)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert again.__dict__ == error.__dict__
    assert str(again) == str(error)
    assert "\n" not in str(error)
    assert kind.__name__ in (errors.__doc__ or "")


def test_a_refusal_can_be_shown_whatever_it_quotes() -> None:
    reasons = ["\ud800\x1b[2J\u202eevil\n", "x" * 10_000 + " is no expert", *["many"] * 1000]
    error = AdapterRejected("a", reasons)
    text = str(error)
    assert text.isprintable() and len(text.encode()) < 10_000
    assert r"\ud800\x1b[2J\u202eevil\n" in text and " is no expert" in text
    assert "and 938 more reasons" in text
