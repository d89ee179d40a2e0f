"""What the engine has counted, at one moment. Torch-free."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from loramux.adapters.pool import AdapterPool
from loramux.adapters.store import AdapterStore
from loramux.config import MemoryPlan
from loramux.engine.scheduler import Scheduler
from loramux.status import AdapterStatus, EngineStats


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
        tenants=scheduler.fair.standing(),
        **_adapter_bytes(store, pool, memory),
    )


def _adapter_bytes(
    store: AdapterStore | None, pool: AdapterPool | None, memory: MemoryPlan
) -> dict[str, Any]:
    """Bytes that adapters take now, as fields of EngineStats; on the device, of each rank."""
    if store is None or pool is None:
        return {}
    row_bytes = memory.needs.pool // pool.num_rows
    return {
        "adapter_host_bytes": store.host_bytes,
        "adapter_device_bytes": pool.rows_taken * row_bytes,
    }
