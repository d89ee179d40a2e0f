"""What the engine has counted, at one moment. Torch-free."""

from __future__ import annotations

from dataclasses import replace

from loramux.adapters.store import AdapterStore
from loramux.config import MemoryPlan
from loramux.engine.scheduler import Scheduler
from loramux.types import AdapterStatus, EngineStats


def snapshot(
    totals: EngineStats,
    scheduler: Scheduler,
    store: AdapterStore | None,
    memory: MemoryPlan,
    adapters: list[AdapterStatus],
) -> EngineStats:
    """`totals`, which the engine counts itself, with what its parts know."""
    blocks, pool, encoder = scheduler.blocks, scheduler.adapters, scheduler.media.encoder
    return replace(
        totals,
        running=len(scheduler.running),
        waiting=len(scheduler.waiting),
        preemptions=scheduler.preemptions,
        prefix_queries=blocks.queries,
        prefix_hits=blocks.hits,
        media_queries=encoder.queries if encoder else 0,
        media_hits=encoder.hits if encoder else 0,
        blocks_total=blocks.num_blocks,
        blocks_used=blocks.num_blocks - blocks.num_free,
        device_evictions=pool.evictions if pool else 0,
        host_loads=store.reads if store else 0,
        host_evictions=store.host.evictions if store else 0,
        memory=memory.parts(),
        adapters=adapters,
    )
