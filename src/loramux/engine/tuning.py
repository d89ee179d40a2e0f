"""What the two ways to shrink cost on this device, measured once and kept on disk.

For each shape of product the model has: how much longer the base product takes with pool rows under
it, and how long the shrink kernel takes. The file's name holds everything the figures depend on, so
a stale one is never read.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from loramux.config import LoRAConfig, ModelFacts
from loramux.config.graphs import row_buckets
from loramux.engine.packing import chunk_rows
from loramux.kernels import LoRASite, WorkList, lora_shrink, shrink_parts
from loramux.layers.linear import MergedLinear

logger = logging.getLogger(__name__)

TOKENS = (1, 8, 32, 64, 128, 256, 1024, 4096)
REPEATS = 5


@dataclass(frozen=True, slots=True)
class CostTable:
    """Microseconds over all layers at the token counts `tokens`.

    `products[t][b]`: added by the first `rows[b]` pool rows in the base products. `kernels[t][b]`:
    taken by the shrink kernels for compositions of `rows[b]` rank rows in all.
    """

    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    products: tuple[tuple[float, ...], ...]
    kernels: tuple[tuple[float, ...], ...]

    def in_product(self, tokens: int, rows: int) -> float:
        return self._look_up(self.products, tokens, rows)

    def in_kernel(self, tokens: int, rows: int) -> float:
        return self._look_up(self.kernels, tokens, rows)

    def _look_up(self, table: Sequence[Sequence[float]], tokens: int, rows: int) -> float:
        """The next larger figures; beyond the last token count, in proportion to it."""
        t = min(bisect.bisect_left(self.tokens, tokens), len(self.tokens) - 1)
        b = min(bisect.bisect_left(self.rows, rows), len(self.rows) - 1)
        return table[t][b] * max(1.0, tokens / self.tokens[-1])


def load_costs(
    sites: Sequence[MergedLinear], lora: LoRAConfig, facts: ModelFacts, *, measure: bool
) -> CostTable:
    """The table for this model, configuration and device; measured now if it is not known yet.

    Without `measure` (there is no GPU) the figures come from bytes alone."""
    if not sites:  # adapters on experts alone
        return CostTable((1,), (1,), ((0.0,),), ((0.0,),))
    if not measure or not sites[0].extends_product:
        return _estimated(sites, facts.row_granule)
    path = _folder() / f"{_key(sites, lora, facts)}.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        table = CostTable(**{name: _tuples(value) for name, value in found.items()})
    except (OSError, ValueError, TypeError):
        start = time.perf_counter()
        table = _measured(sites, facts.row_granule)
        logger.info("measured the LoRA kernels in %.1f s", time.perf_counter() - start)
        _save(path, table)
    return table


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "loramux" / "tuning"


def _key(sites: Sequence[MergedLinear], lora: LoRAConfig, facts: ModelFacts) -> str:
    device = torch.device(facts.device)
    factors = {
        "lora": lora.compute_hash(),
        "geometry": sorted((*shape, count) for shape, count in _shapes(sites).items()),
        "dtype": facts.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(factors, sort_keys=True).encode()).hexdigest()[:32]


def _save(path: Path, table: CostTable) -> None:
    """Whole or not at all: two servers may start at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(asdict(table)))
        part.replace(path)
    except OSError as error:
        logger.info("the tuning cache cannot be written: %s", error)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _shapes(sites: Sequence[MergedLinear]) -> Counter[tuple[int, int, int]]:
    """(slices, in, out) -> how many sites have it."""
    return Counter((s.num_slices, s.in_features, s.out_features) for s in sites)


def _estimated(sites: Sequence[MergedLinear], granule: int) -> CostTable:
    """From the bytes of A at 4 bytes a nanosecond, and 3 microseconds a launch."""
    rows = tuple(row_buckets(max(site.pool_rows for site in sites), granule))
    per_row = sum(s.num_slices * s.in_features / s.row_sharers for s in sites) * 2 / 4e6
    products = tuple(tuple(per_row * r * max(1, t / 256) for r in rows) for t in TOKENS)
    kernels = tuple(
        tuple(per_row * r + 3.0 * len(sites) + 0.01 * t * len(sites) for r in rows) for t in TOKENS
    )
    return CostTable(TOKENS, rows, products, kernels)


# --- measuring -------------------------------------------------------------------------------------


@torch.inference_mode()
def _measured(sites: Sequence[MergedLinear], granule: int) -> CostTable:
    rows = tuple(row_buckets(sites[0].pool_rows, granule))
    by_shape: dict[tuple[int, int, int], list[MergedLinear]] = {}
    for site in sites:
        by_shape.setdefault((site.num_slices, site.in_features, site.out_features), []).append(site)
    products = [[0.0] * len(rows) for _ in TOKENS]
    kernels = [[0.0] * len(rows) for _ in TOKENS]
    for alike in by_shape.values():
        for t, tokens in enumerate(TOKENS):
            plain = _time(alike, lambda site, x: F.linear(x, site.product_weight(0)), tokens)
            for b, count in enumerate(rows):
                wide = _time(alike, _product_with(count), tokens)
                products[t][b] += max(0.0, wide - plain) * len(alike)
                kernels[t][b] += _time(alike, _kernel_for(tokens, count), tokens) * len(alike)
    return CostTable(TOKENS, rows, _rounded(products), _rounded(kernels))


def _rounded(table: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(value, 1) for value in line) for line in table)


Work = Callable[[MergedLinear, torch.Tensor], object]


def _product_with(rows: int) -> Work:
    return lambda site, x: F.linear(x, site.product_weight(rows))


def _kernel_for(tokens: int, rows: int) -> Work:
    """A shrink as if adapters of 16 rows, on this rank, shared the tokens evenly."""

    def run(site: MergedLinear, x: torch.Tensor) -> None:
        assert site.shrink_site is not None
        work, pool = _even_work(tokens, rows // site.row_sharers, site.shrink_site)
        parts = shrink_parts(tokens, site.in_features, work.max_chunks)
        h = x.new_empty(parts, tokens, 16 * site.num_slices, dtype=torch.float32)
        lora_shrink(x, pool, work, h)

    return run


_works: dict[tuple[int, ...], tuple[WorkList, torch.Tensor]] = {}


def _even_work(tokens: int, rows: int, site: LoRASite) -> tuple[WorkList, LoRASite]:
    """A work list of `rows // 16` adapters, and the site as if they were all there."""
    device = site.a.device
    key = (tokens, rows, *site.row_r.shape, device.index or 0)
    if key not in _works:
        adapters = max(1, min(rows // 16, tokens))
        step = chunk_rows(tokens)
        share = -(-tokens // adapters)
        one = int(torch.ones(1).view(torch.int32))  # the bits of the scale
        chunks = [
            (at, min(at + step, start + share, tokens), m, m + 1, 16 * m, 0, one, 16)
            for m, start in enumerate(range(0, tokens, share))
            for at in range(start, min(start + share, tokens), step)
        ]
        firsts = torch.arange(adapters, dtype=torch.int32, device=device) * 16  # [M]
        work = WorkList(
            chunks=torch.tensor(chunks, dtype=torch.int32, device=device),
            counts=torch.tensor([0, len(chunks)], dtype=torch.int32, device=device),
            member_rows=firsts,
            member_columns=torch.zeros_like(firsts),
            member_scales=torch.ones(adapters, device=device),
            member_ranks=torch.full_like(firsts, 16),
            rows_per_chunk=step,
            max_chunks=len(chunks),
        )
        _works[key] = (work, torch.full_like(site.row_r, 16))
    work, ranks = _works[key]
    return work, LoRASite(site.a, site.b, site.slice_starts, ranks, site.row_scale)


def _time(sites: Sequence[MergedLinear], run: Work, tokens: int) -> float:
    """Median microseconds of one call, over different layers so that no cache holds the weights."""
    x = torch.randn(tokens, sites[0].in_features, dtype=sites[0].dtype, device=sites[0].device)
    used = sites[:8]
    for site in used[:2]:
        run(site, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for site in used:
            run(site, x)
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(used))
    return float(statistics.median(times))
