"""How a GPU runner's steps shrink: by what it chooses, for which graphs, and on which stream."""

from __future__ import annotations

import torch

from loramux.config import LoRAConfig, ModelFacts
from loramux.config.graphs import active_buckets, row_buckets
from loramux.engine.lora_choice import LoRAChooser
from loramux.engine.tuning import load_costs
from loramux.layers.tower import TowerLinear
from loramux.models.attach import Attached


def make_chooser(
    attached: Attached,
    lora: LoRAConfig | None,
    facts: ModelFacts,
    device: torch.device,
    *,
    measure: bool,
) -> tuple[list[int], LoRAChooser | None]:
    """(bounds of active compositions, the chooser); none where no adapters are served."""
    if lora is None or not (attached.sites or attached.experts):
        return [], None
    active = active_buckets(lora.max_loras) if lora.specialize_active_lora else []
    linears = [s for s in attached.sites if not isinstance(s, TowerLinear)]
    sites = [s for s in linears if s.extends_product] or linears
    extends = bool(sites) and sites[0].extends_product
    buckets = row_buckets(sites[0].pool_rows, facts.row_granule) if extends else []
    costs = load_costs(sites, lora, facts, measure=measure)
    # One choice on all ranks: it decides what is captured, and so what meets in collectives.
    return active, LoRAChooser(buckets, attached.group.share(costs, device))


def side_stream(lora: LoRAConfig | None, device: torch.device) -> torch.cuda.Stream | None:
    """Where a shrink runs beside the base product, if `lora` asks for it."""
    if lora is None or not lora.dual_stream(str(device)):
        return None
    return torch.cuda.Stream(device)
