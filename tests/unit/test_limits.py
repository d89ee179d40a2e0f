"""Limits of adapters as an operator writes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from loramux.cli import build_parser, settings_from
from loramux.config import EngineConfig, ReplicaConfig
from loramux.config.keywords import engine_config
from loramux.errors import ConfigError

LIMITS: dict[str, Any] = {
    "team-a/hot": {"weight": 4, "max_concurrency": 2},
    "team-a/*": {"weight": 2, "requests_per_minute": 90.5, "tokens_per_minute": 1000},
    "org/base": {"max_waiting": 5},
    "*": {"weight": 0.5},
}


def test_the_first_pattern_that_fits_counts_and_the_base_goes_by_its_names() -> None:
    config = EngineConfig(
        model="/models/x", served_model_name=["org/other", "org/base"], adapter_limits=LIMITS
    )
    assert config.limits_of("team-a/hot").quotas == {"max_concurrency": 2}
    assert config.limits_of("team-a/b/c").quotas == {
        "requests_per_minute": 90.5,
        "tokens_per_minute": 1000,
    }
    assert [config.limits_of(name).weight for name in ("team-a/x", "team-b", "")] == [2, 0.5, 1]
    assert config.limits_of("").max_waiting == 5
    assert EngineConfig(model="m").limits_of("anything").weight == 1
    by_path = EngineConfig(model="org/base", adapter_limits=LIMITS)
    assert by_path.limits_of("").max_waiting == 5


@pytest.mark.parametrize("name", ["a.c", "a[bc]", "a?"])
def test_only_the_star_is_special(name: str) -> None:
    config = EngineConfig(model="m", adapter_limits={name: {"weight": 3}})
    assert config.limits_of(name).weight == 3
    assert config.limits_of("abc").weight == config.limits_of("ab").weight == 1


def test_every_fault_is_named_at_once() -> None:
    wrong = {
        "a": {"weight": 0, "speed": 3},
        "b": {"max_concurrency": 0, "tokens_per_minute": "many"},
        "c*": {"weight": float("nan")},
        "c/d": {"weight": 1},
        "": {},
        "e": 7,
        "f": {"requests_per_minute": float("inf")},
    }
    with pytest.raises(ValidationError) as caught:
        EngineConfig(model="m", adapter_limits=wrong)
    said = str(caught.value)
    for part in (
        '"a": weight',
        "no limit 'speed'",
        '"b": max_concurrency',
        "tokens_per_minute",
        '"c*": weight',
        '"c/d" stands behind "c*"',
        "the pattern ''",
        '"e"',
        '"f": requests_per_minute',
    ):
        assert part in said, part


def test_the_flag_takes_json_and_names_what_is_wrong() -> None:
    parser = build_parser()
    given = parser.parse_args(["serve", "m", "--adapter-limits", json.dumps(LIMITS)])
    assert settings_from(EngineConfig, given, model="m").limits_of("team-a/x").weight == 2
    given = parser.parse_args(["serve", "m", "--adapter-limits", '{"a": {"weight": -1}}'])
    with pytest.raises(ConfigError, match=r'--adapter-limits: "a": weight: .* not -1'):
        settings_from(EngineConfig, given, model="m")


def test_offline_and_with_replicas_there_are_weights_only() -> None:
    weights = {"a": {"weight": 3}}
    assert engine_config("m", adapter_limits=weights).limits_of("a").weight == 3
    with pytest.raises(ConfigError, match="'team-a/hot' has max_concurrency; 'team-a/\\*' has req"):
        engine_config("m", adapter_limits=LIMITS)
    ReplicaConfig(replicas=2).check_engine(EngineConfig(model="m", adapter_limits=weights))
    with pytest.raises(ConfigError, match="replicas do not count together"):
        ReplicaConfig(replicas=2).check_engine(EngineConfig(model="m", adapter_limits=LIMITS))
