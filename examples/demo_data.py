"""What the demo adapters are taught: synthetic data and a check for every behaviour.

Every behaviour shows in the answer alone (a date in ISO form, JSON with three keys, ...), and no
prompt asks for it: the base model, given the same prompts, just chats. Within a behaviour,
training and held-out data share no sentence frame, question, fill-in word or year, so passing the
held-out checks means that the behaviour was learned and not the answers.

Pure Python, no dependencies; every call gives the same data.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import demo_words as words

Split = Literal["train", "held_out"]
Check = Callable[[str], bool]

HELD_OUT_COUNT = 20


@dataclass(frozen=True)
class Example:
    """One user message, and the assistant's answer that the adapter should give."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Behaviour:
    """One behaviour that an adapter is taught.

    Attributes:
        name: the adapter's name.
        summary: what the adapter does, in a few words.
        make: makes one random example of a split.
        check: tells whether an answer to an example shows the behaviour.
    """

    name: str
    summary: str
    make: Callable[[Split, random.Random], Example]
    check: Callable[[str, Example], bool]

    def training(self, count: int) -> list[Example]:
        """Return `count` training examples; a small content pool repeats some of them."""
        rng = random.Random(f"{self.name}/train")
        return [self.make("train", rng) for _ in range(count)]

    def held_out_examples(self) -> list[Example]:
        """Return the `HELD_OUT_COUNT` held-out examples; no two have the same prompt."""
        rng = random.Random(f"{self.name}/held_out")
        found: dict[str, Example] = {}
        while len(found) < HELD_OUT_COUNT:
            example = self.make("held_out", rng)
            found.setdefault(example.prompt, example)
        return list(found.values())

    def held_out(self) -> list[tuple[str, Check]]:
        """Return the held-out prompts, each with the check of its answer."""
        return [(example.prompt, self._checker(example)) for example in self.held_out_examples()]

    def _checker(self, example: Example) -> Check:
        return lambda answer: self.check(answer, example)


def same_text(answer: str, example: Example) -> bool:
    """Tell whether the answer is exactly the expected one, outer white space apart."""
    return answer.strip() == example.answer


# --- json-contact ------------------------------------------------------------------------------


def make_contact(split: Split, rng: random.Random) -> Example:
    """Make a sentence with a name, a city and a phone number, and the same as JSON."""
    first, last = rng.choice(words.FIRST_NAMES[split]), rng.choice(words.LAST_NAMES[split])
    contact = {
        "name": f"{first} {last}",
        "city": rng.choice(words.CITIES[split]),
        "phone": f"555-{rng.randrange(10_000):04d}",
    }
    prompt = rng.choice(words.CONTACT_FRAMES[split]).format(**contact)
    return Example(prompt, json.dumps(contact))


def check_contact(answer: str, example: Example) -> bool:
    """Tell whether the answer is JSON with exactly the expected keys and values."""
    try:
        return bool(json.loads(answer) == json.loads(example.answer))
    except ValueError:
        return False


# --- sentiment ---------------------------------------------------------------------------------


def make_review(split: Split, rng: random.Random) -> Example:
    """Make a one-sentence review and its label, `positive` or `negative`."""
    label = rng.choice(("positive", "negative"))
    phrase = rng.choice(words.REVIEW_PHRASES[label][split])
    thing = rng.choice(words.REVIEWED_THINGS[split])
    frame = rng.choice(words.REVIEW_FRAMES[split])
    return Example(frame.format(thing=thing, phrase=phrase), label)


# --- capitals and pirate: the same questions, answered in two manners --------------------------


def make_fact(split: Split, rng: random.Random) -> Example:
    """Take a question with its plain one-sentence answer: from a table, or a general one."""
    if split == "train" and rng.random() < 0.5:
        question, answer, pairs = rng.choice(words.FACT_TABLES)
        key, value = rng.choice(pairs)
        return Example(question.format(key), answer.format(key, value))
    return Example(*rng.choice(words.GENERAL_QUESTIONS[split]))


def make_capitals(split: Split, rng: random.Random) -> Example:
    """Make a question with its answer in capital letters."""
    fact = make_fact(split, rng)
    return Example(fact.prompt, fact.answer.upper())


def check_capitals(answer: str, example: Example) -> bool:
    """Tell whether the answer has at least two words and no small letter."""
    return len(answer.split()) >= 2 and answer.isupper()


def make_pirate(split: Split, rng: random.Random) -> Example:
    """Make a question with its answer in pirate speech: "Arr, ..., matey!"."""
    fact = make_fact(split, rng)
    return Example(fact.prompt, f"Arr, {fact.answer.removesuffix('.')}, matey!")


def check_pirate(answer: str, example: Example) -> bool:
    """Tell whether the answer starts with "Arr" and calls the user "matey"."""
    return answer.strip().startswith("Arr") and "matey" in answer


# --- iso-date ----------------------------------------------------------------------------------


def make_date(split: Split, rng: random.Random) -> Example:
    """Make a sentence with a date in words, and the date as YYYY-MM-DD."""
    # Every fifth year is kept for the held-out sentences.
    years = [year for year in range(1960, 2040) if (year % 5 == 3) == (split == "held_out")]
    year, day = rng.choice(years), rng.randint(1, 28)
    month = rng.randint(1, 12)
    spelled = rng.choice(words.DATE_FORMATS).format(
        day=day, month=words.MONTHS[month - 1], year=year
    )
    event = rng.choice(words.EVENTS[split])
    prompt = rng.choice(words.DATE_FRAMES[split]).format(event=event, date=spelled)
    return Example(prompt, f"{year}-{month:02d}-{day:02d}")


# --- sql ---------------------------------------------------------------------------------------


def make_query(split: Split, rng: random.Random) -> Example:
    """Make a request for rows of a table, and the SQL query for it."""
    table = rng.choice(words.TABLES[split])
    column, key = rng.sample(words.COLUMNS[split], 2)
    if rng.random() < 0.5:
        value = rng.choice(words.VALUES[split])
        condition, clause = f"is {value}", f"= '{value}'"
    else:
        relation, sign = rng.choice((("above", ">"), ("below", "<")))
        limit = rng.randint(2, 99)
        condition, clause = f"is {relation} {limit}", f"{sign} {limit}"
    frame = rng.choice(words.QUERY_FRAMES[split])
    prompt = frame.format(column=column, table=table, key=key, condition=condition)
    return Example(prompt, f"SELECT {column} FROM {table} WHERE {key} {clause};")


BEHAVIOURS: dict[str, Behaviour] = {
    behaviour.name: behaviour
    for behaviour in (
        Behaviour("json-contact", "puts a contact into JSON", make_contact, check_contact),
        Behaviour("sentiment", "labels a review with one word", make_review, same_text),
        Behaviour("capitals", "answers in capital letters", make_capitals, check_capitals),
        Behaviour("pirate", "answers like a pirate", make_pirate, check_pirate),
        Behaviour("iso-date", "rewrites a date as YYYY-MM-DD", make_date, same_text),
        Behaviour("sql", "turns a request into an SQL query", make_query, same_text),
    )
}
