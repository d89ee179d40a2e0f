"""The simulation of a full queue on a small one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import overload

SMALL = overload.Case(
    requests=60, input_len=20, output_len=8, adapters=30, max_loras=4, max_num_seqs=16, blocks=900
)


def test_time_is_that_of_the_steps() -> None:
    """One request alone: a prompt and seven single tokens, which nothing else is beside."""
    case = replace(SMALL, requests=1, adapters=0)
    row = overload.simulate(case)
    steps_ms = 8 * case.step_ms + (20 + 7) * case.token_ms
    assert (row.steps, row.loads, row.twice) == (8, 0, 1.0)
    assert row.tok_s == pytest.approx(8 / steps_ms * 1000, rel=0.01)


def test_everything_is_answered_and_launching_costs() -> None:
    row = overload.simulate(SMALL)
    assert row.twice >= 1.0 and row.loads >= 4
    assert overload.simulate(replace(SMALL, adapters=0)).tok_s > row.tok_s
    launched = overload.simulate(replace(SMALL, largest_graph=0))
    assert launched.tok_s < row.tok_s, "prompts come one by one, each in a step that is launched"
    again = overload.simulate(SMALL)
    assert again == row, "nothing but the seed decides"


def test_rows_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    words = "--requests 12 --input-len 20 --output-len 4 --adapters 6 --max-loras 2 --blocks 400"
    assert overload.main([*words.split(), "--output", str(path)]) == 0
    head, base, row = (json.loads(line) for line in path.read_text().splitlines())
    assert head["settings"]["requests"] == 12 and base["adapters"] == 0 and base["ratio"] == 1.0
    assert row["adapters"] == 6 and 0 < row["ratio"] < 1
    assert "12 requests at once" in capsys.readouterr().out
