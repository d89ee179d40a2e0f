"""Who is given up, and when: time is what the test says."""

from __future__ import annotations

from loramux.engine.watch import STARTING_S, Watch


def _pass(watch: Watch, seconds: float, entered: int = 0) -> tuple[int, str] | None:
    found = None
    for _ in range(int(seconds * 4)):
        found = found or watch.tick(0.25, entered)
    return found


def test_a_silent_rank_is_given_up_and_one_that_speaks_is_not() -> None:
    watch = Watch(3, 2.0)
    watch.ready()
    for _ in range(10):
        watch.heard(1, 0, 0.0)
        watch.heard(2, 0, 0.0)
        assert _pass(watch, 1.5) is None
    watch.heard(1, 0, 0.0)
    assert _pass(watch, 1.5) == (2, "no sign of life for 2 s")


def test_starting_may_take_its_time_but_not_for_ever() -> None:
    watch = Watch(2, 2.0)
    assert _pass(watch, STARTING_S - 1) is None
    watch.ready()
    assert _pass(watch, 1.5) is None  # it has been silent while it was allowed to
    watch = Watch(2, 2.0)
    assert _pass(watch, STARTING_S - 1) is None
    assert _pass(watch, 2) is not None


def test_a_step_may_be_slow_as_long_as_it_goes_on() -> None:
    watch = Watch(2, 2.0)
    watch.ready()
    with watch.waiting():
        for entered in range(20):
            watch.heard(1, entered, 0.0)
            assert _pass(watch, 1.5, entered=entered + 1) is None
        found = None
        for _ in range(10):
            watch.heard(1, 19, 0.0)
            found = found or _pass(watch, 0.5, entered=20)
        assert found == (1, "a step has stood still for 2 s")  # it has entered the fewest


def test_nobody_is_given_up_between_steps() -> None:
    watch = Watch(2, 2.0)
    watch.ready()
    with watch.waiting():
        pass
    for _ in range(10):
        watch.heard(1, 7, 0.0)
        assert _pass(watch, 1.0, entered=7) is None


def test_a_write_that_hangs_is_found() -> None:
    watch = Watch(2, 2.0)
    watch.ready()
    watch.heard(1, 0, 1.9)
    assert watch.tick(0.25, 0) is None
    watch.heard(1, 0, 2.1)
    assert watch.tick(0.25, 0) == (1, "writing an adapter has taken more than 2 s")
