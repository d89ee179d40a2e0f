"""The scheduler of a resolved config."""

from __future__ import annotations

from loramux.adapters.pool import AdapterPool
from loramux.config import EngineConfig
from loramux.config.facts import EncoderFacts
from loramux.config.memory import place_rows
from loramux.engine.blocks import BlockPool
from loramux.engine.encoder_cache import EncoderCache
from loramux.engine.fair_share import FairShare
from loramux.engine.scheduler import Scheduler, SchedulerLimits


def make_scheduler(
    config: EngineConfig, num_blocks: int, encoder: EncoderFacts | None = None
) -> Scheduler:
    """The scheduler of a resolved config."""
    assert config.max_num_batched_tokens is not None
    limits = SchedulerLimits(
        *(config.max_num_seqs, config.max_num_batched_tokens, config.adapter_patience_s),
        see_whole=encoder is not None and encoder.sees_whole,
    )
    blocks = BlockPool(
        num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
    )
    lora = config.lora
    granule = config.row_granule
    pool = None
    if lora is not None:
        rows = place_rows(lora, granule)
        pool = AdapterPool(lora.max_loras, lora.max_lora_rank, granule, affine_rows=rows)
    room = config.encoder_cache_tokens
    cache = EncoderCache(room, limits.max_num_batched_tokens) if room else None
    fair = FairShare(lambda name: config.limits_of(name).weight)
    return Scheduler(limits, blocks, pool, cache, fair)
