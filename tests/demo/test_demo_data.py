"""The demo data: held-out content is new, and the checks tell right answers from wrong ones."""

from __future__ import annotations

import demo_words
import pytest
from demo_data import BEHAVIOURS, HELD_OUT_COUNT, Behaviour, Example, check_contact

ALL = pytest.mark.parametrize("behaviour", BEHAVIOURS.values(), ids=lambda b: b.name)
# More than any recipe trains on.
MANY = 2000

SPLIT_LISTS = {
    "first names": demo_words.FIRST_NAMES,
    "last names": demo_words.LAST_NAMES,
    "cities": demo_words.CITIES,
    "contact frames": demo_words.CONTACT_FRAMES,
    "reviewed things": demo_words.REVIEWED_THINGS,
    "positive phrases": demo_words.REVIEW_PHRASES["positive"],
    "negative phrases": demo_words.REVIEW_PHRASES["negative"],
    "review frames": demo_words.REVIEW_FRAMES,
    "general questions": demo_words.GENERAL_QUESTIONS,
    "events": demo_words.EVENTS,
    "date frames": demo_words.DATE_FRAMES,
    "tables": demo_words.TABLES,
    "columns": demo_words.COLUMNS,
    "values": demo_words.VALUES,
    "query frames": demo_words.QUERY_FRAMES,
}


@pytest.mark.parametrize("lists", SPLIT_LISTS.values(), ids=SPLIT_LISTS.keys())
def test_train_and_held_out_words_are_disjoint(lists):
    assert lists["train"] and lists["held_out"]
    assert not set(lists["train"]) & set(lists["held_out"])


@ALL
def test_train_and_held_out_prompts_are_disjoint(behaviour: Behaviour):
    trained = {example.prompt for example in behaviour.training(MANY)}
    assert not trained & {prompt for prompt, _ in behaviour.held_out()}


def test_train_and_held_out_years_are_disjoint():
    dates = BEHAVIOURS["iso-date"]
    trained = {example.answer[:4] for example in dates.training(MANY)}
    assert not trained & {example.answer[:4] for example in dates.held_out_examples()}


@ALL
def test_data_is_the_same_in_every_call(behaviour: Behaviour):
    assert behaviour.training(50) == behaviour.training(50)
    assert behaviour.held_out_examples() == behaviour.held_out_examples()


@ALL
def test_reference_answers_pass_their_own_check(behaviour: Behaviour):
    assert all(behaviour.check(e.answer, e) for e in behaviour.training(MANY))
    examples, held_out = behaviour.held_out_examples(), behaviour.held_out()
    assert len(examples) == len(held_out) == HELD_OUT_COUNT
    for example, (prompt, check) in zip(examples, held_out, strict=True):
        assert prompt == example.prompt
        assert check(example.answer)


@ALL
@pytest.mark.parametrize("answer", ["", " ", "I am not sure. Tell me more.", "{}", "A"])
def test_other_answers_fail_the_check(behaviour: Behaviour, answer: str):
    assert not any(check(answer) for _, check in behaviour.held_out())


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "Nina Hansen", "city": "Rome"}',
        '{"name": "Nina Hansen", "city": "Rome", "phone": "555-0001", "age": 3}',
        '{"name": "Nina Hansen", "city": "Rome", "phone": "555-0002"}',
        'Sure: {"name": "Nina Hansen", "city": "Rome", "phone": "555-0001"}',
        '{"name": "Nina Hansen", "city": "Rome", "phone": "555-0001',
    ],
    ids=["key missing", "key too many", "wrong value", "text around", "cut off"],
)
def test_contact_check_wants_exactly_the_three_values(answer: str):
    right = '{"name": "Nina Hansen", "city": "Rome", "phone": "555-0001"}'
    example = Example("I met Nina Hansen in Rome and wrote down the number 555-0001.", right)
    assert check_contact(right, example)
    assert not check_contact(answer, example)
