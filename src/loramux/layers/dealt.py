"""The sites of rows of A that `fully_sharded_loras` deals out, beside the pool's own sites."""

from __future__ import annotations

from collections.abc import Sequence

from loramux.kernels import LoRASite
from loramux.layers.experts import Experts
from loramux.layers.linear import MergedLinear
from loramux.layers.sharded import ShardedLinear, empty_site


def dealt_sites(
    layers: Sequence[MergedLinear], experts: Sequence[Experts], deal: int
) -> list[LoRASite]:
    """One for each site of the pool, in their order; empty where a layer deals nothing out.

    Of a group of one rank: none at all."""
    if deal == 1:
        return []
    found: list[LoRASite] = []
    for layer in layers:
        own = layer.dealt_site if isinstance(layer, ShardedLinear) else None
        found += [own or _nothing(site, deal) for site in (layer.site,) if site is not None]
    for one in experts:
        for site, own in zip(one.sites, (one.dealt_site, None), strict=False):
            found.append(own or _nothing(site, deal))
    return found


def _nothing(site: LoRASite, deal: int) -> LoRASite:
    """The rows of `site` as one rank has them dealt, with nothing in them."""
    rows = -(-site.row_r.shape[1] // site.experts // deal) * site.experts
    starts = (0,) * (site.num_slices + 1)
    return empty_site(
        site.num_slices, rows, 0, starts, site.a.dtype, site.a.device, experts=site.experts
    )
