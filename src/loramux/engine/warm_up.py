"""Steps of every kind before the first request, which would else wait for compilers.

Triton compiles a kernel and FlashInfer builds a module where it is first used, and the math library
chooses an algorithm. The largest step also makes the allocator and FlashInfer's workspaces as large
as they will be: memory that does not suffice is found out at start, and not by a request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loramux.config import EngineConfig
from loramux.config.memory import pool_rank
from loramux.engine.graphs import StepOutput
from loramux.engine.lora_choice import LoRAChoice, LoRAChooser
from loramux.engine.packing import runs_of
from loramux.engine.plan import Members, Row, RowMedia, SampleSpec
from loramux.engine.sampler import Sampler
from loramux.types import SamplingParams

logger = logging.getLogger(__name__)

TOKENS = (8, 100, 1000)  # beside the largest step; each has LoRA chunks of another size
Run = Callable[[Sequence[Row], LoRAChoice | None], StepOutput]
"""Runs rows as a step that reads block 0 of the KV cache and stores nothing in it."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step: tokens and sequences in it, tokens of one sequence and of one block."""

    tokens: int
    sequences: int
    length: int
    block_size: int

    @classmethod
    def of(cls, config: EngineConfig) -> StepLimits:
        """Those of a resolved config."""
        assert config.max_num_batched_tokens is not None and config.max_model_len is not None
        tokens, length = config.max_num_batched_tokens, config.max_model_len
        return cls(tokens, config.max_num_seqs, length, config.block_size)


def places(config: EngineConfig) -> dict[int, int]:
    """First pool row -> rank rows of two adapters of the largest rank, or of the one that fits."""
    lora = config.lora
    if lora is None:
        return {}
    rows = pool_rank(lora, config.row_granule)
    return {place * rows: rows for place in range(lora.max_loras)[:2]}


def warm_up(
    run: Run,
    sampler: Sampler,
    limits: StepLimits,
    ranks: Mapping[int, int],
    buckets: Sequence[int],
) -> None:
    """Run steps of few to most tokens, without and with adapters, and sample in every way.

    `ranks` are `places` (empty: no LoRA is served), `buckets` the pool rows that a base product may
    take along. Runs out of memory where the GPU has none for the largest step.
    """
    start = time.perf_counter()
    # The largest first: what the others need is then a part of its memory.
    for tokens in sorted({limits.tokens, *TOKENS}, reverse=True):
        if tokens <= limits.tokens:
            _run_step(run, sampler, limits, ranks, buckets, tokens)
    logger.info("warmed up in %.1f s", time.perf_counter() - start)


def warm_up_adapters(
    run: Run, limits: StepLimits, ranks: Mapping[int, int], buckets: Sequence[int]
) -> None:
    """The steps with adapters once more, whose kernels are others where these have gains and shifts."""
    for tokens in sorted({limits.tokens, *TOKENS}, reverse=True) if ranks else ():
        if tokens <= limits.tokens:
            rows = with_members(step_rows(limits, tokens), ranks)
            for choice in ways_to_shrink(rows, ranks, buckets, tokens):
                run(rows, choice)


def _run_step(
    run: Run,
    sampler: Sampler,
    limits: StepLimits,
    ranks: Mapping[int, int],
    buckets: Sequence[int],
    tokens: int,
) -> None:
    rows = step_rows(limits, tokens)
    output = run(rows, None)
    if ranks:
        mixed = with_members(rows, ranks)
        for choice in ways_to_shrink(mixed, ranks, buckets, tokens):
            output = run(mixed, choice)
    batch = output.logits.shape[0]
    for specs in (sample_kinds()[:batch], [_spec(temperature=0.0)] * batch, [_spec()] * batch):
        few = slice(len(specs))
        sampler.choose(output.logits[few], specs, output.ids[few], output.greedy[few]).read()


def step_rows(limits: StepLimits, tokens: int) -> list[Row]:
    """As many sequences as there may be, one token each but for the last ones, which are long."""
    count = min(limits.sequences, tokens)
    spare = min(tokens, count * limits.length) - count
    rows = []
    for index in range(count):
        more = min(spare, limits.length - 1)
        spare -= more
        blocks = -(-(1 + more) // limits.block_size)
        spec = _spec(temperature=0.0)
        rows.append(Row(count - 1 - index, (0,) * (1 + more), 0, (0,) * blocks, (), spec))
    return rows[::-1]


def whole_row(block_size: int) -> Row:
    """A row of an image whose tokens see all of it."""
    media = RowMedia(whole=((0, block_size, block_size - 1),))
    return Row(0, (0,) * block_size, 0, (0,), (), _spec(temperature=0.0), media=media)


def with_members(rows: Sequence[Row], ranks: Mapping[int, int]) -> list[Row]:
    """The same rows, base rows first, then those of each adapter, then those of a sum of all."""
    singles: list[Members] = [((row, 1.0),) for row in ranks]
    sums: list[Members] = [tuple((row, 0.5) for row in ranks)] if len(ranks) > 1 else []
    kinds: list[Members] = [(), *singles, *sums]
    count = len(rows)
    # Counted from the end: where rows are few, they are those with adapters.
    places = (len(kinds) - 1 - (count - 1 - i) * len(kinds) // count for i in range(count))
    return [row._replace(members=kinds[place]) for row, place in zip(rows, places, strict=True)]


@dataclass(frozen=True, slots=True)
class _Fixed:
    """Costs that always favour one way."""

    product: float

    def in_product(self, tokens: int, rows: int) -> float:
        return self.product

    def in_kernel(self, tokens: int, rows: int) -> float:
        return 1.0


def ways_to_shrink(
    rows: Sequence[Row], ranks: Mapping[int, int], buckets: Sequence[int], tokens: int
) -> list[LoRAChoice]:
    """In a kernel of its own and, where there are `buckets`, in the base product."""
    runs = runs_of(rows)
    found = [LoRAChooser(buckets, _Fixed(cost)).choose(runs, ranks, tokens) for cost in (2.0, 0.0)]
    return found if buckets else found[:1]


def sample_kinds() -> list[SampleSpec]:
    """A row for everything that the sampler tells apart."""
    penalties: dict[str, Any] = {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
    }
    drawn = _spec(top_p=0.9, **penalties)._replace(prompt_ids=(0, 1), output_ids=(1,))
    return [
        _spec(temperature=0.0),
        _spec(seed=1),
        _spec(top_k=5),
        _spec(top_p=0.9),
        _spec(min_p=0.1),
        drawn,
        drawn._replace(params=replace(drawn.params, temperature=0.0), pending=True),
        _spec(logit_bias={0: 1.0})._replace(stop_ids=(1,)),
        _spec(temperature=0.0, logprobs=0),
        _spec(top_k=5, top_p=0.9, logprobs=5),
    ]


def _spec(**params: Any) -> SampleSpec:
    return SampleSpec(SamplingParams(**params), seed=0, position=0)
