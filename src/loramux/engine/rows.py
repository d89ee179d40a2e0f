"""From a sequence to its row in a plan. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter

from loramux.engine.activation import members_of_row
from loramux.engine.encoder_cache import encoder_key
from loramux.engine.media_spans import vectors_between
from loramux.engine.plan import PENDING, Members, Row, RowMedia, SampleSpec
from loramux.engine.sequence import Sequence

_sequence_id = attrgetter("sequence_id")


def make_rows(scheduled: Mapping[Sequence, int], *, see_whole: bool) -> list[Row]:
    """The rows of a step, in order."""
    return in_order(make_row(s, count, see_whole=see_whole) for s, count in scheduled.items())


def in_order(rows: Iterable[Row]) -> list[Row]:
    """`rows` as a step has them: sorted by members, those with equal ones by sequence. Members are
    compared once for a composition, not for a row."""
    groups: dict[Members, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.members, []).append(row)
    found: list[Row] = []
    for members in sorted(groups):
        found += sorted(groups[members], key=_sequence_id)
    return found


def make_row(sequence: Sequence, count: int, *, see_whole: bool = False) -> Row:
    """The next `count` tokens of `sequence`, which has the blocks for them. `see_whole`: an image's
    tokens see all of it."""
    start = sequence.num_computed
    end = start + count
    token_ids = tuple(sequence.tokens[start:end])
    if end > len(sequence.tokens):
        token_ids += (PENDING,)
    members, before = sequence.members, None
    if sequence.last_start > start:
        members, before = members_of_row(members, sequence.starts, start, end)
    return Row(  # by position: there are hundreds a step
        sequence.sequence_id,
        token_ids,
        start,
        sequence.block_table,
        members,
        _sample_spec(sequence) if end == sequence.length and not sequence.pools else None,
        sequence.shift,
        row_media(sequence, start, end, see_whole) if sequence.items else None,
        before,
    )


def row_media(sequence: Sequence, start: int, end: int, see_whole: bool) -> RowMedia | None:
    """What of media stands in tokens [start, end); None behind the prompt."""
    media = sequence.request.media
    if media is None or start >= sequence.num_prompt:
        return None
    vectors, whole = [], []
    for item in sequence.items:
        key = encoder_key(item, sequence.encoder_composition)
        for token, vector, count in vectors_between(item, start, end):
            vectors.append((key, vector, count, token - start))
        if see_whole:
            for a, b in item.spans:
                if max(a, start) < min(b, end):
                    whole.append((max(a, start) - start, min(b, end) - start, b - 1))
    if media.positions is None and not vectors:
        return None
    return RowMedia(tuple(vectors), media.positions, tuple(whole))


def _sample_spec(sequence: Sequence) -> SampleSpec:
    params = sequence.request.params
    penalised = (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )
    position = sequence.length - sequence.num_prompt
    return SampleSpec(
        params,
        sequence.seed,
        position,
        sequence.stop_ids if position < params.min_tokens else (),
        tuple(sequence.tokens[: sequence.num_prompt]) if penalised else (),
        tuple(sequence.output_ids) if penalised else (),
        sequence.num_pending > 0,
    )
