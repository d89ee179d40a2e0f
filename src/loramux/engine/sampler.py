"""From logits to tokens, which stay on the device until they are read.

Order of operations, as in vLLM: log-probabilities of the raw logits; penalties and bias;
temperature; min-p; top-k and top-p; a draw. Nothing of a row depends on its neighbours, so an
answer with a seed is the same in every batch (on one kind of device: the CPU and GPUs draw from
different streams of noise).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from loramux.engine import host_draw
from loramux.engine.adjust import Adjusted, adjust
from loramux.engine.logprobs import Logprobs, logprobs
from loramux.engine.plan import Sampled, SampleSpec
from loramux.engine.transfer import Download, upload

Draw = Callable[
    [torch.Tensor, list[int], list[int], Sequence[SampleSpec], torch.Tensor],
    None,
]


class Choice:
    """What was chosen: `tokens` [B] int64 on the device at once, and on the host when read."""

    def __init__(self, tokens: torch.Tensor, wanted: Logprobs | None):
        self.tokens = tokens  # [B]
        self._wanted = wanted
        parts = () if wanted is None else (wanted.values, wanted.ids)
        self._download = Download(tokens, *parts)

    def read(self) -> list[Sampled]:
        """Wait for this choice, not for what was launched after it."""
        chosen, *parts = self._download.wait()
        tokens: list[int] = chosen.tolist()
        if self._wanted is None:
            return [Sampled(token) for token in tokens]
        found = self._wanted.build(tokens, *parts)
        return [Sampled(token, found.get(row)) for row, token in enumerate(tokens)]


class Sampler:
    """Chooses tokens for rows that may all differ. On CUDA it never waits for the device."""

    def __init__(self, device: torch.device):
        self._draw: Draw = _draw_on_host
        if device.type == "cuda":
            try:
                from loramux.kernels import triton_sampling  # noqa: F401
            except ImportError:
                return
            self._draw = _draw_by_kernels

    def choose(
        self,
        logits: torch.Tensor,
        specs: Sequence[SampleSpec],
        before: torch.Tensor | None = None,
        greedy: torch.Tensor | None = None,
    ) -> Choice:
        """Choose a token for each row of `logits` [B, V], which is not changed.

        `before` [B] int64: the tokens of the step before, read only for rows whose spec is
        `pending`. `greedy` [B] int64: the rows' argmax, if it is known. Neither is kept.
        """
        if logits.device.type == "cpu":
            logits = logits.float()  # [B, V], since torch is slow at 16 bits there
        tokens = logits.argmax(dim=-1) if greedy is None else greedy.clone()  # [B]
        adjusted = adjust(logits, specs, before)
        if adjusted is not None:
            tokens.index_copy_(0, adjusted.index, adjusted.logits.argmax(dim=-1))
        for source, places, rows in _drawn(logits, specs, adjusted):
            self._draw(source, places, rows, specs, tokens)
        return Choice(tokens, logprobs(logits, tokens, specs))


def sample(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> list[Sampled]:
    """Choose a token for each row of `logits` [B, V] and wait for it."""
    return Sampler(logits.device).choose(logits, specs).read()


def _drawn(
    logits: torch.Tensor, specs: Sequence[SampleSpec], adjusted: Adjusted | None
) -> list[tuple[torch.Tensor, list[int], list[int]]]:
    """The rows that are not greedy: from where, which rows of it, which rows of the batch."""
    drawn = [row for row, spec in enumerate(specs) if not spec.params.greedy]
    places = {} if adjusted is None else {row: n for n, row in enumerate(adjusted.rows)}
    plain = [row for row in drawn if row not in places]
    groups = [(logits, plain, plain)]
    if adjusted is not None:
        changed = [row for row in drawn if row in places]
        groups.append((adjusted.logits, [places[row] for row in changed], changed))
    return [group for group in groups if group[1]]


def _draw_on_host(
    source: torch.Tensor,
    places: list[int],
    rows: list[int],
    specs: Sequence[SampleSpec],
    tokens: torch.Tensor,
) -> None:
    """Replace `tokens` [B] at `rows` by draws from rows `places` of `source` [N, V]."""
    where, index = torch.tensor([places, rows], device=source.device)  # [D] each
    chosen = host_draw.draw(source[where].float(), [specs[row] for row in rows])  # [D]
    tokens.index_copy_(0, index, chosen)


def _draw_by_kernels(
    source: torch.Tensor,
    places: list[int],
    rows: list[int],
    specs: Sequence[SampleSpec],
    tokens: torch.Tensor,
) -> None:
    """The same without waiting for the device."""
    from loramux.kernels import triton_sampling as kernels

    draws = []
    for place, row in zip(places, rows, strict=True):
        spec, p = specs[row], specs[row].params
        draw = kernels.Draw(
            source=place,
            target=row,
            seed=spec.seed,
            position=spec.position,
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
        )
        draws.append(draw)
    (settings,) = upload(source.device, kernels.pack(draws, source.shape[-1]))  # [C, D]
    kernels.draw(source, settings, tokens, any(draw.cuts for draw in draws))
