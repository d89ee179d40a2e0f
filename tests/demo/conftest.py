"""Fixtures of the demo tests: the `examples` folder on the path, and the demo model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """Return the folder of the demo model, fetched on the first use on this machine.

    Without a network these tests are skipped, but never where CI counts on them.
    """
    from demo_model import ensure_demo_model

    try:
        return ensure_demo_model()
    except RuntimeError as error:
        if os.environ.get("CI") or "could not download" not in str(error):
            raise
        pytest.skip(f"the demo model is not here and cannot be fetched: {error}")
