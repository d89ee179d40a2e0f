"""The benchmark of sums with deltas, between two processes of a CPU, where they are never one op."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import deltas


def test_rows_of_every_case(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    few = ["--columns", "128", "--tokens", "2", "--adapters", "4:1", "4:2", "4:3"]
    assert deltas.main(["--device", "cpu", "--output", str(path), *few]) == 0
    _, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    said = [(row["fully"], row["rank"], row["adapters"]) for row in rows]
    assert said == [(False, 4, 1), (False, 4, 2), (True, 4, 1), (True, 4, 2)]
    for row in rows:
        assert row["sum_us"] > 0 and row["one_after_the_other_us"] > 0
        assert row["as_one_us"] is None and not row["taken"]


def test_what_is_no_pair_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        deltas.main(["--device", "cpu", "--adapters", "16"])
    assert "16" in capsys.readouterr().err
