"""Random tokens with noise from the host: for the CPU, and for devices without kernels of ours.

A draw depends on the row's seed and position alone, so an answer with a seed is the same in every
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from loramux.engine.plan import SampleSpec

WINDOW = 1024  # tokens that are looked at before the whole vocabulary is sorted


def draw(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """One random token for each row of `logits` [D, V]: argmax of p / e with e ~ Exp(1)."""
    temperature = _column(logits, [s.params.temperature for s in specs])  # [D, 1]
    logits = _cut_min_p(logits / temperature, specs)  # [D, V]
    size = logits.shape[-1]
    # How a row is drawn depends on its own settings alone, so its neighbours cannot change it.
    cut = [i for i, s in enumerate(specs) if _top_k(s, size) < size or s.params.top_p < 1.0]
    whole = [i for i in range(len(specs)) if i not in set(cut)]
    chosen = torch.empty(len(specs), dtype=torch.long, device=logits.device)  # [D]
    if whole:
        chosen[whole] = _race(logits[whole], [specs[i] for i in whole])
    width = {i: min(size, max(WINDOW, _top_k(specs[i], size) % size)) for i in cut}
    while width:
        # Those of one width at a time: which of equal tokens come first depends on it.
        least = min(width.values())
        rows = [i for i, own in width.items() if own == least]
        some = [specs[i] for i in rows]
        window, tokens, enough = _likeliest(logits[rows], some, least)  # [C, W], [C, W], [C]
        place = _race(window, some)  # [C]
        chosen[rows] = tokens.gather(-1, place.unsqueeze(-1)).squeeze(-1)
        width |= dict.fromkeys(rows, size)
        for i, done in zip(rows, enough.tolist(), strict=True):
            if done or least == size:
                del width[i]
    return chosen


def _race(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """Winner of each row of [D, W]. Of a longer row, the noise of the first places is the same."""
    width = logits.shape[-1]
    noise = np.stack([_noise(spec, width) for spec in specs])  # [D, W]
    probabilities = logits.softmax(dim=-1)  # [D, W]
    return (probabilities / torch.from_numpy(noise).to(logits.device)).argmax(dim=-1)  # [D]


def _noise(spec: SampleSpec, size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Exp(1) draws that depend on seed and position only; made on the CPU so devices agree."""
    generator = np.random.Generator(np.random.SFC64([spec.seed & (2**63 - 1), spec.position]))
    return np.maximum(generator.standard_exponential(size, dtype=np.float32), 1e-30)  # [size]


def _cut_min_p(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    if not any(s.params.min_p > 0 for s in specs):
        return logits
    min_p = _column(logits, [max(s.params.min_p, 1e-30) for s in specs])  # [D, 1]
    floor = logits.amax(dim=-1, keepdim=True) + min_p.log()  # [D, 1]
    return logits.masked_fill(logits < floor, -torch.inf)


def _top_k(spec: SampleSpec, size: int) -> int:
    return spec.params.top_k if 0 < spec.params.top_k < size else size


def _likeliest(
    logits: torch.Tensor, specs: Sequence[SampleSpec], width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of [C, V], what top_k and top_p leave of the `width` likeliest tokens: logits [C, W], -inf
    where cut, their ids, and whether [C] nothing else would be left of the whole vocabulary."""
    size = logits.shape[-1]
    top_k = _column(logits, [_top_k(s, size) for s in specs])  # [C, 1]
    top_p = _column(logits, [s.params.top_p for s in specs])  # [C, 1]
    window, tokens = logits.topk(width)  # [C, W], likeliest first
    place = torch.arange(width, device=logits.device)  # [W]
    window = window.masked_fill(place >= top_k, -torch.inf)
    # top_p counts the mass of what top_k left
    total = logits.logsumexp(dim=-1, keepdim=True)  # [C, 1]
    mass = torch.where(top_k < size, window.logsumexp(-1, keepdim=True), total)  # [C, 1]
    share = (window - mass).exp()  # [C, W]
    through = share.cumsum(dim=-1)  # [C, W]
    cut = (through - share >= top_p) & (place > 0)  # the likeliest token always stays
    enough = (through[:, -1:] >= top_p) | (top_k < size)  # [C, 1]
    return window.masked_fill(cut, -torch.inf), tokens, enough.squeeze(-1)


def _column(like: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(-1)  # [D, 1]
