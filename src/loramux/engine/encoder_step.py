"""The encoder's own step, before the language model's: what a plan asks to encode, kept by key.

plan.forget ── plan.encode, in batches ── overlay of the rows' embeddings
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch

from loramux.config.memory import MOST_ENCODED
from loramux.engine.encoder_cache import Encode
from loramux.engine.plan import Row, StepPlan
from loramux.errors import EngineError
from loramux.layers.batch import Overlay, UniformLoRA
from loramux.models.towers import Towers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepMedia:
    """What media bring into a step of T tokens; each None where there is no such thing."""

    overlay: Overlay | None
    positions: np.ndarray | None
    """[3, T]"""

    last_keys: torch.Tensor | None
    """[T] int32, see `AttentionBatch`."""


class EncoderStep:
    """Vectors [1 + L, n, D] by key, as the scheduler's `EncoderCache` has decided.

    All of it is queued on the stream of the steps, so what a step forgets may still be read by the
    step before."""

    def __init__(
        self,
        towers: Towers,
        ranks: Mapping[int, int],
        affine_rows: Set[int] = frozenset(),
        *,
        sees_whole: bool = False,
    ):
        """`ranks`: rank rows of the adapter at a first pool row, `affine_rows`: those of adapters with
        gains and shifts; both are looked at in every step. `sees_whole`: tokens of an image see all
        of it."""
        self.sees_whole = sees_whole
        self._towers = towers
        self._ranks = ranks
        self._affine_rows = affine_rows
        self._vectors: dict[str, torch.Tensor] = {}
        self._failed: dict[str, Exception] = {}  # until the scheduler lets it be forgotten

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> dict[str, Exception]:
        """Forget and encode. Returns why vectors that the plan's rows need are not there, by their keys:
        a step that was planned before the one before had been read may count on what that one could
        not encode."""
        for key in plan.forget:
            self._vectors.pop(key, None)
            self._failed.pop(key, None)
        failed: dict[str, Exception] = {}
        for batch in _batches(plan.encode):
            try:
                self._encode(batch)
            except Exception as error:
                if len(batch) == 1:
                    failed[batch[0].key] = error
                else:
                    failed |= self._one_by_one(batch)
        for key, why in failed.items():
            logger.error("media %s cannot be encoded", key[:16], exc_info=why)
        self._failed |= failed
        needed = {key for row in plan.rows if row.media for key, *_ in row.media.vectors}
        missing = needed - self._vectors.keys()
        lost = EngineError("its vectors are not there. This is a bug.")
        return {key: self._failed.get(key, lost) for key in missing}

    def _one_by_one(self, batch: Sequence[Encode]) -> dict[str, Exception]:
        """Find out whose fault it is."""
        failed: dict[str, Exception] = {}
        for one in batch:
            try:
                self._encode([one])
            except Exception as error:
                failed[one.key] = error
        return failed

    def _encode(self, batch: Sequence[Encode]) -> None:
        loras = [self._lora(one.members) for one in batch]
        found = self._towers.encode([one.item for one in batch], loras)
        for one, vectors in zip(batch, found, strict=True):
            self._vectors[one.key] = vectors  # [1 + L, n, D]
            self._failed.pop(one.key, None)

    def _lora(self, members: tuple[tuple[int, float], ...]) -> UniformLoRA | None:
        if not members:
            return None
        rows = [row for row, _ in members]
        affine = frozenset(row for row in rows if row in self._affine_rows)
        return UniformLoRA(members, tuple(self._ranks[row] for row in rows), affine)

    def media(self, rows: Sequence[Row], device: torch.device) -> StepMedia | None:
        """What media stand in `rows`, in the order of the step."""
        if not any(row.media is not None for row in rows):
            return None
        last = last_keys(rows)
        return StepMedia(
            self._overlay(rows, device),
            positions_of(rows),
            None if last is None else torch.from_numpy(last).to(device),
        )

    def _overlay(self, rows: Sequence[Row], device: torch.device) -> Overlay | None:
        places: list[np.ndarray] = []
        parts: list[torch.Tensor] = []
        token = 0
        for row in rows:
            for key, first, count, offset in row.media.vectors if row.media else ():
                if (vectors := self._vectors.get(key)) is None:
                    continue  # it could not be encoded; who waits for it is told
                places.append(np.arange(token + offset, token + offset + count))
                parts.append(vectors[:, first : first + count])  # [1 + L, count, D]
            token += len(row.token_ids)
        if not parts:
            return None
        at = torch.from_numpy(np.concatenate(places)).to(device)  # [M]
        return Overlay(at, torch.cat(parts, dim=1))  # [1 + L, M, D]


def positions_of(rows: Sequence[Row]) -> np.ndarray | None:
    """Of all tokens of a step in three dimensions, int64 [3, T]; None where no row has such."""
    if not any(row.media is not None and row.media.positions is not None for row in rows):
        return None
    parts = []
    for row in rows:
        count = len(row.token_ids)
        own = np.tile(np.arange(row.start, row.start + count) + row.shift, (3, 1))  # [3, n]
        if row.media is not None and row.media.positions is not None:
            known = row.media.positions[:, row.start : row.start + count]
            own[:, : known.shape[1]] = known
        parts.append(own)
    return np.concatenate(parts, axis=1)  # [3, T]


def last_keys(rows: Sequence[Row]) -> np.ndarray | None:
    """The last position each token of a step sees, int32 [T]: its own, or its image's last; None where
    all see their own."""
    if not any(row.media is not None and row.media.whole for row in rows):
        return None
    parts = []
    for row in rows:
        last = np.arange(row.start, row.start + len(row.token_ids), dtype=np.int32)  # [n]
        for start, stop, key in row.media.whole if row.media else ():
            last[start:stop] = key
        parts.append(last)
    return np.concatenate(parts)  # [T]


def _batches(encodes: Sequence[Encode]) -> list[list[Encode]]:
    """Not too large, and equal compositions beside each other."""
    batches: list[list[Encode]] = []
    size = MOST_ENCODED + 1
    for one in sorted(encodes, key=lambda encode: encode.members):
        if size + one.item.num_vectors > MOST_ENCODED:
            batches.append([])
            size = 0
        batches[-1].append(one)
        size += one.item.num_vectors
    return batches
