"""Log-probabilities of the model's own distribution: tensors first, objects when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loramux.engine.plan import SampleSpec
from loramux.engine.transfer import upload
from loramux.types import MAX_LOGPROBS, TokenLogprob, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of the rows that want them: the chosen token first, then the likeliest ones."""

    counts: dict[int, int]  # row -> how many of the likeliest ones it wants
    values: torch.Tensor  # [W, 1 + n] float32
    ids: torch.Tensor  # [W, 1 + n] int64: the chosen token's rank, then token ids

    def build(
        self, tokens: Sequence[int], values: torch.Tensor, ids: torch.Tensor
    ) -> dict[int, TokenLogprobs]:
        """Row -> its log-probabilities, from host copies; `tokens` are all the chosen ones."""
        rows = zip(self.counts.items(), values.tolist(), ids.tolist(), strict=True)
        return {
            row: TokenLogprobs(
                TokenLogprob(tokens[row], numbers[0], others[0]),
                tuple(
                    TokenLogprob(token, value, rank)
                    for rank, (token, value) in enumerate(
                        zip(others[1 : 1 + count], numbers[1:], strict=False), start=1
                    )
                ),
            )
            for (row, count), numbers, others in rows
        }


def logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, specs: Sequence[SampleSpec]
) -> Logprobs | None:
    """For the rows of `logits` [B, V] that want them, given the chosen `tokens` [B]."""
    counts = {
        row: spec.params.logprobs
        for row, spec in enumerate(specs)
        if spec.params.logprobs is not None
    }
    if not counts:
        return None
    (index,) = upload(logits.device, np.array(list(counts), dtype=np.int64))  # [W]
    raw = logits[index].float().log_softmax(dim=-1)  # [W, V]
    chosen = raw.gather(-1, tokens.index_select(0, index).unsqueeze(-1))  # [W, 1]
    rank = (raw > chosen).sum(dim=-1, keepdim=True) + 1  # [W, 1]
    # Of one width, so that which of equal tokens come first is no matter of the neighbours.
    width = min(MAX_LOGPROBS, raw.shape[-1]) if any(counts.values()) else 0
    top, ids = raw.topk(width)  # [W, n] each
    return Logprobs(counts, torch.cat([chosen, top], dim=-1), torch.cat([rank, ids], dim=-1))
