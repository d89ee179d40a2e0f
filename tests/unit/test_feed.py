"""Events reach everybody who keeps up, in order; who does not is dropped, and learns it."""

from __future__ import annotations

import asyncio
import threading

from loramux.adapters.feed import EventFeed


def test_all_hear_all_from_when_they_listen() -> None:
    feed = EventFeed()
    woken: list[int] = []
    feed.tell("registered", "a", "d")
    early = feed.listen(lambda: woken.append(1))
    feed.tell("evicted", "a", "d", place="host")
    late = feed.listen(lambda: woken.append(2))
    feed.tell("gone", "a", "d")
    assert [e.kind for e in early.take()] == ["evicted", "gone"] and early.take() == []
    assert [(e.number, e.kind, e.place) for e in late.take()] == [(3, "gone", None)]
    assert woken == [1, 1, 2]
    feed.leave(early)
    feed.leave(early)
    feed.tell("registered", "b", "d")
    assert early.take() == [] and len(late.take()) == 1


def test_a_slow_listener_is_dropped_and_holds_up_nobody() -> None:
    feed = EventFeed()
    slow, quick = feed.listen(lambda: None, capacity=3), feed.listen(lambda: None, capacity=3)
    for number in range(8):
        feed.tell("registered", str(number), "d")
        assert [e.name for e in quick.take()] == [str(number)]
    assert slow.dropped and not quick.dropped and feed.num_listeners == 1
    assert [e.name for e in slow.take()] == ["0", "1", "2"]


def test_a_listener_whose_loop_is_closed_is_dropped() -> None:
    loop = asyncio.new_event_loop()
    feed = EventFeed()

    def wake() -> None:
        loop.call_soon_threadsafe(int)

    feed.listen(wake)
    loop.close()
    feed.tell("registered", "a", "d")
    assert feed.num_listeners == 0


def test_many_threads_tell_each_event_once() -> None:
    feed = EventFeed()
    listener = feed.listen(lambda: None, 10_000)

    def work() -> None:
        for _ in range(500):
            feed.tell("device-loaded", "a", "d")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [e.number for e in listener.take()] == list(range(1, 2001))
