"""Several requests in flight together, and what each got."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loramux.engine.engine import Engine
from loramux.types import AdapterUse, PoolingOutput, PoolingParams, SamplingParams


@dataclass(slots=True)
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    pooled: PoolingOutput | None = None


def answered_together(
    engine: Engine,
    asked: Iterable[tuple[Sequence[int], SamplingParams | PoolingParams, Sequence[str]]],
) -> list[Answer]:
    """The answer to each (prompt, parameters, names of adapters); all of them end without an error."""
    answers = []
    for number, (prompt, params, names) in enumerate(asked):
        engine.submit(str(number), prompt, params, [AdapterUse(name) for name in names])
        answers.append(Answer())
    while engine.has_requests:
        deltas = engine.step()
        if not deltas:
            engine.wait()
        for delta in deltas:
            assert delta.error is None
            answer = answers[int(delta.request_id)]
            answer.tokens += delta.token_ids
            answer.logprobs += delta.logprobs or ()
            if delta.pooled is not None:
                assert delta.finish_reason == "stop"
                answer.pooled = delta.pooled
    engine.check_integrity()
    return answers
