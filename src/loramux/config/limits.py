"""What an adapter may take: its weight, and its limits of rate, concurrency and queue."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MOST_WEIGHT = 1000.0


class AdapterLimits(BaseModel):
    """The limits of one adapter. Answers count: a request with `n` answers is as many."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    weight: float = Field(default=1.0, ge=1 / MOST_WEIGHT, le=MOST_WEIGHT, allow_inf_nan=False)
    """Its share of tokens, seats and blocks while others want them, in relation to theirs."""

    max_concurrency: int | None = Field(default=None, ge=1)
    """Most answers that have not ended."""

    requests_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Answers asked for in a minute. An adapter that was idle may ask for a minute's at once."""

    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Tokens of prompts, counted when they are admitted, and of answers, counted as they come."""

    max_waiting: int | None = Field(default=None, ge=1)
    """While so many of its answers have no token yet, no request is admitted."""

    @property
    def quotas(self) -> dict[str, float]:
        """The limits that are set, by name; the weight is none."""
        named = self.model_dump(exclude={"weight"}, exclude_none=True)
        return {name: float(value) for name, value in named.items()}


BASE_TENANT = ""
"""The base model, among the names of adapters."""

NO_LIMITS = AdapterLimits()


def limits_of(
    limits: Mapping[str, AdapterLimits] | None, name: str, base_names: Iterable[str]
) -> AdapterLimits:
    """Those of the first pattern that fits `name`, or for BASE_TENANT any of `base_names`."""
    names = tuple(base_names) if name == BASE_TENANT else (name,)
    for pattern, found in (limits or {}).items():
        if any(fits(pattern, candidate) for candidate in names):
            return found
    return NO_LIMITS


def fits(pattern: str, name: str) -> bool:
    """Whether `pattern`, in which `*` stands for any characters, slashes too, is for `name`."""
    expression = ".*".join(map(re.escape, pattern.split("*")))
    return re.fullmatch(expression, name, re.DOTALL) is not None


def quotas_among(limits: Mapping[str, AdapterLimits] | None) -> list[str]:
    """What is more than a weight, by pattern: "'team-a/*' has max_concurrency"."""
    found = {pattern: own.quotas for pattern, own in (limits or {}).items()}
    return [f"{pattern!r} has {', '.join(quotas)}" for pattern, quotas in found.items() if quotas]


def read_limits(value: Any) -> dict[str, AdapterLimits]:
    """Limits by pattern, from what an operator wrote. Raises ValueError with every reason."""
    if not isinstance(value, Mapping):
        raise ValueError('adapter_limits must be like {"team-a/*": {"weight": 2}, "*": {}}')
    limits: dict[str, AdapterLimits] = {}
    faults: list[str] = []
    seen: list[str] = []
    for pattern, given in value.items():
        if not isinstance(pattern, str) or not pattern:
            faults.append(f"the pattern {pattern!r} is no name")
            continue
        hidden_by = next((before for before in seen if fits(before, pattern)), None)
        if hidden_by is not None:
            faults.append(f"{_shown(pattern)} stands behind {_shown(hidden_by)}, which fits it too")
        seen.append(pattern)
        try:
            limits[pattern] = AdapterLimits.model_validate(given)
        except ValidationError as error:
            faults += [f"{_shown(pattern)}: {_fault(fault)}" for fault in error.errors()]
    if faults:
        raise ValueError("; ".join(faults))
    return limits


def _shown(pattern: str) -> str:
    return json.dumps(pattern)


def _fault(fault: Any) -> str:
    where = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"there is no limit {where!r}, but {', '.join(AdapterLimits.model_fields)}"
    given = fault["input"]
    said = f"{fault['msg']}, not {given!r}" if not isinstance(given, Mapping) else fault["msg"]
    return f"{where}: {said}" if where else said
