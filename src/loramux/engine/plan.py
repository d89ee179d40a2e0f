"""What passes between the scheduler, which decides with integers, and the runner, which has tensors.

A `StepPlan` is frozen and whole: nothing else is read to execute it, so it can be sent to other
processes. What a step has hundreds of are named tuples, made in a third of the time of a frozen
dataclass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from loramux.engine.encoder_cache import Encode
from loramux.types import AdapterRef, SamplingParams, TokenLogprobs


class SampleSpec(NamedTuple):
    """How to choose the next token of a row.

    `seed` with the number of tokens chosen so far fixes the random draw, whatever else is in the
    batch. `prompt_ids` and `output_ids` are there only if a penalty needs them.
    """

    params: SamplingParams
    seed: int
    position: int
    stop_ids: tuple[int, ...] = ()  # forbidden before min_tokens
    prompt_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()  # without the pending token, if there is one
    pending: bool = False  # the token before this one is still on the device, see PENDING


Members = tuple[tuple[int, float], ...]
"""(first pool row, scale) of each adapter that applies; () is the base."""

CHOSEN_ELSEWHERE = SampleSpec(SamplingParams(), seed=0, position=0)
"""Stands for what a rank that chooses no tokens need not know."""

PENDING = -1
"""In place of a token id: what this sequence chose in the step launched last, not read back yet."""


@dataclass(frozen=True, slots=True)
class RowMedia:
    """What of media stands in a row.

    `vectors` are (key of the encoder's cache, first vector, count, first token of the row) of each run.
    `positions` int32 [3, N] are those of the whole prompt, where the model counts them in three
    dimensions; tokens behind it stand at index + `Row.shift`.
    `whole` are tokens [start, stop) of the row that see each other, and the last position they see,
    where the model lets an image's tokens do that.
    """

    vectors: tuple[tuple[str, int, int, int], ...] = ()
    positions: Any = None
    whole: tuple[tuple[int, int, int], ...] = ()


class Row(NamedTuple):
    """One sequence's share of a step: tokens at positions [start, start + len(token_ids)).

    The last token may be `PENDING`: the device takes it from the step before. Where an activated LoRA
    begins within, `before` says how many tokens come before that, and the members of those.
    """

    sequence_id: int
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    members: Members
    sample: SampleSpec | None  # None while the prompt is not finished
    shift: int = 0  # from the index of a token to its position, where `media` does not say it
    media: RowMedia | None = None
    before: tuple[int, Members] | None = None

    def parts(self) -> tuple[tuple[int, Members], ...]:
        """(tokens, members) of the one or two parts in which the members are the same."""
        count = len(self.token_ids)
        if self.before is None:
            return ((count, self.members),)
        return self.before, (count - self.before[0], self.members)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Rows with equal (last) members are neighbours; base rows come first.

    Before it the encoder's vectors of `forget` are given up and those of `encode` made. `pooled` are the
    sequences whose prompt ends in this step and that want its last hidden state."""

    rows: tuple[Row, ...]
    encode: tuple[Encode, ...] = ()
    forget: tuple[str, ...] = ()
    pooled: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)

    def for_others(self) -> PlanForOthers:
        """The same for a rank that chooses no tokens."""
        rows = [(*row[:5], row.sample is not None, *row[6:]) for row in self.rows]
        return PlanForOthers(rows, self.encode, self.forget, self.pooled)


@dataclass(frozen=True, slots=True)
class PlanForOthers:
    """A `StepPlan` on its way, without what only the rank that chooses tokens needs.

    Its rows are tuples of a `Row`'s fields, with whether there is a sample in place of it: written and
    read in a third of the time, which every step of several ranks waits for."""

    rows: list[tuple[Any, ...]]
    encode: tuple[Encode, ...]
    forget: tuple[str, ...]
    pooled: tuple[int, ...]

    def plan(self) -> StepPlan:
        """Which rows have a `sample` is right, and not what."""
        rows = tuple(
            Row(number, tokens, start, table, members, CHOSEN_ELSEWHERE if chooses else None, *rest)
            for number, tokens, start, table, members, chooses, *rest in self.rows
        )
        return StepPlan(rows, self.encode, self.forget, self.pooled)


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """Bring this version to the rank rows from `first_row` on."""

    ref: AdapterRef
    first_row: int


class Sampled(NamedTuple):
    """The token a row chose, and its log-probabilities if they were asked for."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """sequence id -> chosen token, for the rows that had a `sample`; and -> final hidden state, a
    float32 tensor [D] on the host, for those in `StepPlan.pooled`. `not_encoded` says why media of the
    plan could not be encoded, by their keys: rows with these have computed nothing of use."""

    sampled: dict[int, Sampled]
    hidden: dict[int, Any] = field(default_factory=dict)
    not_encoded: Mapping[str, Exception] = field(default_factory=dict)
