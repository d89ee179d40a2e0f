"""From logits to tokens, a row at a time where rows differ, all at once where they do not.

Order of operations, as in vLLM: log-probabilities of the raw logits; bias and penalties;
temperature; min-p; top-k and top-p; a draw. A draw depends on the row's seed and position alone, so
an answer with a seed is the same in every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from loramux.engine.plan import Sampled, SampleSpec
from loramux.types import SamplingParams, TokenLogprob, TokenLogprobs

WINDOW = 1024  # tokens that are looked at before the whole vocabulary is sorted


def sample(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> list[Sampled]:
    """Choose a token for each row of `logits` [B, V]; `logits` is not changed."""
    logits = logits.float()  # [B, V]
    wants = [spec.params.logprobs is not None for spec in specs]
    raw = logits.log_softmax(dim=-1) if any(wants) else None  # [B, V]
    adjusted = _adjust(logits, specs)  # [B, V]
    chosen = adjusted.argmax(dim=-1)  # [B]
    drawn = [i for i, spec in enumerate(specs) if not spec.params.greedy]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)  # [D]
        chosen[index] = _draw(adjusted[index], [specs[i] for i in drawn])
    tokens = chosen.tolist()
    if raw is None:
        return [Sampled(token) for token in tokens]
    return [
        Sampled(token, _logprobs(raw[i], token, specs[i].params) if wants[i] else None)
        for i, token in enumerate(tokens)
    ]


def _adjust(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """Biases, penalties and forbidden stops; the same tensor where no row has any."""
    touched = [i for i, spec in enumerate(specs) if _touches(spec)]
    if not touched:
        return logits
    logits = logits.clone()  # [B, V]
    for i in touched:
        _adjust_row(logits[i], specs[i])
    return logits


def _touches(spec: SampleSpec) -> bool:
    return bool(spec.params.logit_bias or spec.stop_ids or spec.prompt_ids or spec.output_ids)


def _adjust_row(row: torch.Tensor, spec: SampleSpec) -> None:
    """Change one row [V] in place."""
    params = spec.params
    if spec.prompt_ids or spec.output_ids:
        _penalise(row, spec)
    for token, bias in params.logit_bias:
        row[token] += bias
    if spec.stop_ids:
        row[list(spec.stop_ids)] = -torch.inf


def _penalise(row: torch.Tensor, spec: SampleSpec) -> None:
    params, device = spec.params, row.device
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*spec.prompt_ids, *spec.output_ids}), device=device)  # [U]
        values = row[seen]  # [U]
        factor = params.repetition_penalty
        row[seen] = torch.where(values > 0, values / factor, values * factor)
    if spec.output_ids and (params.frequency_penalty or params.presence_penalty):
        output = torch.tensor(spec.output_ids, device=device)  # [N]
        tokens, counts = output.unique(return_counts=True)  # [U], [U]
        row[tokens] -= params.frequency_penalty * counts + params.presence_penalty


def _draw(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
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
    if cut:
        rows = [specs[i] for i in cut]
        window, tokens = _likeliest(logits[cut], rows)  # [C, W], [C, W]
        place = _race(window, rows)  # [C]
        chosen[cut] = tokens.gather(-1, place.unsqueeze(-1)).squeeze(-1)
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
    logits: torch.Tensor, specs: Sequence[SampleSpec]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of [C, V], the tokens that top_k and top_p leave: logits [C, W], -inf where cut, and ids.

    The whole vocabulary is sorted only if the first `WINDOW` places do not hold enough mass.
    """
    size = logits.shape[-1]
    top_k = _column(logits, [_top_k(s, size) for s in specs])  # [C, 1]
    top_p = _column(logits, [s.params.top_p for s in specs])  # [C, 1]
    widest = max((k for s in specs if (k := _top_k(s, size)) < size), default=1)
    total = logits.logsumexp(dim=-1, keepdim=True)  # [C, 1]
    for width in (min(size, max(WINDOW, widest)), size):
        window, tokens = logits.topk(width)  # [C, W], likeliest first
        place = torch.arange(width, device=logits.device)  # [W]
        window = window.masked_fill(place >= top_k, -torch.inf)
        # top_p counts the mass of what top_k left
        mass = torch.where(top_k < size, window.logsumexp(-1, keepdim=True), total)  # [C, 1]
        share = (window - mass).exp()  # [C, W]
        through = share.cumsum(dim=-1)  # [C, W]
        if width == size or bool(((through[:, -1:] >= top_p) | (top_k < size)).all()):
            break
    cut = (through - share >= top_p) & (place > 0)  # the likeliest token always stays
    return window.masked_fill(cut, -torch.inf), tokens


def _column(like: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(-1)  # [D, 1]


def _logprobs(row: torch.Tensor, token: int, params: SamplingParams) -> TokenLogprobs:
    """The chosen token's log-probability and rank, and the likeliest alternatives, from [V]."""
    value = row[token]
    rank = int((row > value).sum()) + 1
    count = min(params.logprobs or 0, row.shape[-1])
    values, tokens = row.topk(count)  # [count]
    top = tuple(
        TokenLogprob(t, v, i + 1)
        for i, (t, v) in enumerate(zip(tokens.tolist(), values.tolist(), strict=True))
    )
    return TokenLogprobs(TokenLogprob(token, float(value), rank), top)
