"""A started engine is left out of collections; a closed one is collected.

In processes of their own: other tests keep engines open.
"""

from __future__ import annotations

import subprocess
import sys

from tiny import TinyWorld

SETTLE = """
import gc, weakref
from loramux.engine.collector import settle

class Cycle:
    def __init__(self):
        self.me = self

old = weakref.ref(Cycle())
kept = Cycle()
seen = weakref.ref(kept)
first, second = settle(), settle()
del kept
first()
first()  # twice is once
gc.collect()
assert old() is None and seen() is not None
second()
gc.collect()
assert seen() is None
assert gc.get_freeze_count() == 0
"""

OPEN = """
import gc, sys
from loramux import LLM, SamplingParams

with LLM(sys.argv[1], device="cpu") as llm:
    assert gc.get_freeze_count() > 10_000
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2))
    llm.close()  # twice is once
assert gc.get_freeze_count() == 0
"""


def test_what_is_settled_is_collected_after_the_last_engine() -> None:
    subprocess.run([sys.executable, "-c", SETTLE], check=True, timeout=120)


def test_an_open_engine_is_settled(tiny_world: TinyWorld) -> None:
    subprocess.run([sys.executable, "-c", OPEN, str(tiny_world.model)], check=True, timeout=120)
