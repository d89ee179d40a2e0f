"""A load waits for the newest step that reads what stood in its rows, and for no other."""

from __future__ import annotations

import random

from loramux.engine.reading import IN_FLIGHT, Reading


def test_the_newest_step_that_reads_a_row() -> None:
    reading: Reading[str] = Reading()
    assert reading.until(0, 16) is None
    reading.launched("first", {0: 8, 16: 16})
    reading.launched("second", {16: 16})
    assert reading.until(16, 4) == "second"
    assert reading.until(0, 4) == "first"
    assert reading.until(8, 8) is None, "between the two"
    assert reading.until(8, 9) == "second", "its last row"
    assert reading.until(7, 1) == "first"
    reading.launched("third", {})
    assert reading.until(0, 8) is None, "the first is done when the third was launched"
    assert reading.until(31, 1) == "second"


def test_every_overlap_is_seen() -> None:
    rng = random.Random(5)
    for _ in range(500):
        reading: Reading[int] = Reading()
        steps = [{rng.randrange(60): rng.randint(1, 16) for _ in range(4)} for _ in range(4)]
        for number, places in enumerate(steps):
            reading.launched(number, places)
        first, rows = rng.randrange(64), rng.randint(1, 16)
        wanted = [
            number
            for number, places in list(enumerate(steps))[-IN_FLIGHT:]
            if {r for start, count in places.items() for r in range(start, start + count)}
            & set(range(first, first + rows))
        ]
        assert reading.until(first, rows) == (max(wanted) if wanted else None)
