"""From a sequence to its row in a plan. Torch-free."""

from __future__ import annotations

from loramux.engine.plan import PENDING, Row, SampleSpec
from loramux.engine.sequence import Sequence


def make_row(sequence: Sequence, count: int) -> Row:
    """The next `count` tokens of `sequence`, which has the blocks for them."""
    start = sequence.num_computed
    end = start + count
    token_ids = tuple(sequence.tokens[start:end])
    if end > len(sequence.tokens):
        token_ids += (PENDING,)
    return Row(
        sequence_id=sequence.sequence_id,
        token_ids=token_ids,
        start=start,
        block_table=sequence.block_table,
        members=sequence.members,
        sample=_sample_spec(sequence) if end == sequence.length and not sequence.pools else None,
    )


def _sample_spec(sequence: Sequence) -> SampleSpec:
    params = sequence.request.params
    penalised = (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )
    position = sequence.length - sequence.num_prompt
    return SampleSpec(
        params=params,
        seed=sequence.seed,
        position=position,
        stop_ids=sequence.stop_ids if position < params.min_tokens else (),
        prompt_ids=tuple(sequence.tokens[: sequence.num_prompt]) if penalised else (),
        output_ids=tuple(sequence.output_ids) if penalised else (),
        pending=sequence.num_pending > 0,
    )
