"""The engine's thread, and what other threads must not do beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from loramux.engine.loop_thread import LoopThread


def test_jobs_run_in_one_thread_in_order() -> None:
    thread = LoopThread("test")
    seen: list[tuple[int, int]] = []
    futures = [thread.submit(lambda i=i: seen.append((i, threading.get_ident()))) for i in range(5)]
    for future in futures:
        future.result(10)
    assert [i for i, _ in seen] == list(range(5))
    assert len({ident for _, ident in seen}) == 1 and seen[0][1] != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        thread.submit(lambda: 1 / 0).result(10)
    thread.close()


SCRIPT = """
import os, torch
from concurrent.futures import ThreadPoolExecutor
from loramux.adapters.store import _compute_alone

def tasks():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
big = torch.ones(1 << 20)
with ThreadPoolExecutor(1, initializer=_compute_alone) as pool:
    pool.submit(int).result()
    before = tasks()
    pool.submit(lambda: (big * 2).sum()).result()
    print("added", tasks() - before, "threads of main", torch.get_num_threads())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads in /proc")
def test_the_adapter_reader_has_no_team_of_workers() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "added 0 threads of main 2"
