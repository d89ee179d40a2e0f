"""The simulation on a small fleet: its numbers are consistent, and the policy is worth having."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fleet

SMALL = fleet.Fleet(replicas=8, adapters=200, places=8, requests=6000, rate=400.0, service_s=0.4)


@pytest.fixture(scope="module")
def rows() -> dict[str, fleet.Row]:
    rows = [fleet.simulate(SMALL, policy, 1.0) for policy in fleet.POLICIES]
    return {row.policy: row for row in [*rows, fleet.one_cache(SMALL, 1.0)]}


def test_affinity_hits_nearly_as_often_as_one_cache(rows: dict[str, fleet.Row]) -> None:
    assert rows["one cache"].hit_rate - rows["affinity"].hit_rate < 0.08
    for other in ("random", "round robin"):
        assert rows["affinity"].hit_rate > rows[other].hit_rate + 0.2
        assert rows["affinity"].loads_s < rows[other].loads_s / 1.5


def test_no_replica_is_far_busier_than_the_others(rows: dict[str, fleet.Row]) -> None:
    assert rows["affinity"].busiest < 2 and rows["affinity"].longest < 2
    assert rows["round robin"].busiest == pytest.approx(1, abs=0.01)


def test_an_adapter_of_a_busy_fleet_stays_if_it_is_not_hot(rows: dict[str, fleet.Row]) -> None:
    even = fleet.simulate(SMALL, "affinity", 0.0)
    assert even.stays > 0.95 and rows["random"].stays < 0.3


def test_the_same_arguments_give_the_same_rows(rows: dict[str, fleet.Row]) -> None:
    assert fleet.simulate(SMALL, "affinity", 1.0) == rows["affinity"]


def test_rows_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--replicas", "2", "--adapters", "9", "--requests", "300", "--zipf", "1"]
    assert fleet.main([*flags, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-fleet.jsonl")
    head, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert head["settings"]["adapters"] == 9 and len(rows) == len(fleet.POLICIES) + 1
    assert "round robin" in capsys.readouterr().out
