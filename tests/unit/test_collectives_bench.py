"""The benchmark of collectives, between two processes of a CPU, where nothing goes through mailboxes."""

from __future__ import annotations

import json
from pathlib import Path

import collectives


def test_rows_of_every_size(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    sizes = ["--kilobytes", "4", "16"]
    assert collectives.main(["--device", "cpu", "--output", str(path), *sizes]) == 0
    head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert head["settings"]["ranks"] == 2
    assert head["settings"]["command"].endswith("--device cpu --output rows.jsonl --kilobytes 4 16")
    assert [row["kilobytes"] for row in rows] == [4, 16]
    for row in rows:
        assert row["sum_nccl_us"] > 0 and row["gather_nccl_us"] > 0
        assert row["gather_us"] is None and row["sum_two_rounds_us"] is None
