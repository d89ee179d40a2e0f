"""Penalties, biases and forbidden stops, all rows at once, on copies of the rows they touch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loramux.engine.plan import SampleSpec
from loramux.engine.transfer import Array, upload
from loramux.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Adjusted:
    """The rows that were touched, and what became of them."""

    rows: list[int]
    index: torch.Tensor  # [T] int64: `rows` on the device
    logits: torch.Tensor  # [T, V] float32


def adjust(
    logits: torch.Tensor, specs: Sequence[SampleSpec], before: torch.Tensor | None
) -> Adjusted | None:
    """Adjusted copies of those rows of `logits` [B, V] that have something to adjust."""
    rows = [row for row, spec in enumerate(specs) if _touches(spec)]
    if not rows:
        return None
    touched = [specs[row] for row in rows]
    size = logits.shape[-1]
    seen, biased, stops = _seen(touched, size), _biased(touched, size), _stops(touched, size)
    waits = [n for n, spec in enumerate(touched) if spec.pending and _penalises(spec.params)]
    fields = (_ints(rows), *seen, *biased, stops, _ints(waits), _ints([rows[n] for n in waits]))
    index, factors, owner, place, count, bias_place, bias, stop_place, local, source = upload(
        logits.device, *fields
    )
    adjusted = logits[index].float().contiguous()  # [T, V], a copy in any case
    flat = adjusted.view(-1)  # [T * V]
    if waits:
        if before is None:
            raise ValueError("a row waits for a token, and no tokens were given")
        pending = local * size + before.index_select(0, source)  # [Q] places
        owner, place, count = _append(owner, place, count, local, pending, len(rows))
    if len(place):
        _penalise(flat, factors, owner, place, count)
    if len(bias):
        flat.index_add_(0, bias_place, bias)
    if len(stops):
        flat.index_fill_(0, stop_place, -torch.inf)
    return Adjusted(rows, index, adjusted)


def _touches(spec: SampleSpec) -> bool:
    said = bool(spec.prompt_ids or spec.output_ids or spec.pending)
    return bool(spec.params.logit_bias or spec.stop_ids or (said and _penalises(spec.params)))


def _penalises(params: SamplingParams) -> bool:
    return bool(
        params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty
    )


def _seen(specs: Sequence[SampleSpec], size: int) -> tuple[Array, Array, Array, Array]:
    """Factors of each row [3, T], and each seen token once: row, place and uses as output [E].

    A place is row * V + token.
    """
    owners, places, counts = [_ints(())], [_ints(())], [_ints(())]
    for row, spec in enumerate(specs):
        uses = _uses(spec)
        owners.append(np.full(len(uses), row, dtype=np.int64))
        places.append(np.fromiter(uses.keys(), np.int64, len(uses)) + row * size)
        counts.append(np.fromiter(uses.values(), np.int64, len(uses)))
    params = [spec.params for spec in specs]
    factors = [
        [p.repetition_penalty for p in params],
        [p.frequency_penalty for p in params],
        [p.presence_penalty for p in params],
    ]
    columns = np.array(factors, dtype=np.float32)  # [3, T]
    return columns, np.concatenate(owners), np.concatenate(places), np.concatenate(counts)


def _uses(spec: SampleSpec) -> dict[int, int]:
    """Token -> how often the answer has it, of the tokens that are penalised."""
    if not _penalises(spec.params):
        return {}
    prompt = spec.prompt_ids if spec.params.repetition_penalty != 1.0 else ()
    uses = dict.fromkeys(prompt, 0)
    uses.update(Counter(spec.output_ids))
    return uses


def _biased(specs: Sequence[SampleSpec], size: int) -> tuple[Array, Array]:
    pairs = [
        (row * size + token, value)
        for row, spec in enumerate(specs)
        for token, value in spec.params.logit_bias
    ]
    return _ints([place for place, _ in pairs]), np.array([v for _, v in pairs], np.float32)


def _stops(specs: Sequence[SampleSpec], size: int) -> Array:
    return _ints([row * size + token for row, spec in enumerate(specs) for token in spec.stop_ids])


def _ints(values: Sequence[int]) -> Array:
    return np.array(values, dtype=np.int64)


def _append(
    owner: torch.Tensor,
    place: torch.Tensor,
    count: torch.Tensor,
    local: torch.Tensor,
    pending: torch.Tensor,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count the pending tokens too: `pending` [Q] are their places, in rows `local` [Q].

    If a token is there already, both entries get its whole count, so that it does not matter
    which is written last.
    """
    waited = torch.full((rows,), -1, dtype=torch.long, device=place.device)  # [T]
    waited.index_copy_(0, local, pending)
    again = (place == waited.index_select(0, owner)).long()  # [E]
    earlier = torch.zeros_like(waited).index_add_(0, owner, again * count)  # [T]
    return (
        torch.cat([owner, local]),
        torch.cat([place, pending]),
        torch.cat([count + again, earlier.index_select(0, local) + 1]),
    )


def _penalise(
    flat: torch.Tensor,
    factors: torch.Tensor,
    owner: torch.Tensor,
    place: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """Change `flat` [T * V] in place."""
    repetition, frequency, presence = factors.index_select(1, owner)  # [E] each
    values = flat.index_select(0, place)  # [E]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * count + presence * (count > 0)
    flat.index_copy_(0, place, values)
