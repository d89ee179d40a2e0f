"""A serving process around a FakeEngine: `python fake_server.py [die]`."""

from __future__ import annotations

import sys
import threading

from fake_engine import FakeEngine

from loramux.cli import main
from loramux.config import ServerConfig
from loramux.server import run


def serve_fake(*_: object) -> int:
    engine = FakeEngine()
    engine.delay_s = 0.05
    config = ServerConfig(port=0, shutdown_timeout_s=float(sys.argv[1]))
    if sys.argv[2:] == ["die"]:
        threading.Timer(1.0, engine.die, [RuntimeError("the GPU is on fire")]).start()
    return run.serve_engine(engine, config, [], run.bind("127.0.0.1", 0))  # type: ignore[arg-type]


run.serve = serve_fake  # type: ignore[assignment]
sys.exit(main(["serve", "org/base"]))
