"""Captured steps with prompts in them, tried before the first request.

Their attention is planned in a way of its own (`kernels/flashinfer_attention.py`), by versions of
libraries that we do not choose. What such a step computes must be what launching it computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from loramux.engine.graphs import Captured, GraphKey, StepGraphs, StepOutput
from loramux.engine.plan import Row, SampleSpec
from loramux.engine.singles import Limits, single_tokens
from loramux.types import SamplingParams

logger = logging.getLogger(__name__)

PROMPTS = (33, 1, 7)  # tokens
MOST_ERROR = 0.2  # of the logits' own length; other kernels round otherwise, wrong ones are near 1

Replay = Callable[[Sequence[Row], GraphKey, Captured, None], StepOutput]


def trial_rows(block_size: int) -> list[Row]:
    """Short prompts from their first position, in blocks of their own from 1 on."""
    spec = SampleSpec(SamplingParams(temperature=0.0), seed=0, position=0)
    rows, block = [], 1
    for number, count in enumerate(PROMPTS):
        end = block + -(-count // block_size)
        tokens = tuple(3 + (5 * place + number) % 16 for place in range(count))
        rows.append(Row(number, tokens, 0, tuple(range(block, end)), (), spec))
        block = end
    return rows


def failing_sizes(
    graphs: StepGraphs,
    rows: Sequence[Row],
    block_size: int,
    launch: Callable[[Sequence[Row]], StepOutput],
    replay: Replay,
    sequences: int,
) -> list[int]:
    """Captured sizes at which a replay of `rows` makes other logits than launching them does, or
    fails. `sequences`: the most rows that a step keeps."""
    singles = single_tokens(rows, block_size, Limits(sum(PROMPTS), sum(PROMPTS) ** 2, sum(PROMPTS)))
    assert singles is not None
    wanted = launch(rows).logits.float()  # [B, V]
    failing = []
    for size in graphs.sizes:
        key = GraphKey(size).keeping(sequences)
        captured = graphs.get(key)
        if size < len(singles) or captured is None:
            continue
        try:
            got = replay(singles, key, captured, None).logits.float()  # [B, V]
            error = float((got - wanted).norm() / wanted.norm())
        except Exception:
            logger.exception("replaying a step of %d tokens failed", size)
            error = 1.0
        if not error <= MOST_ERROR:  # NaN as well
            failing.append(size)
    return failing
