"""Ranks that are threads of a test and talk through gloo."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from loramux.parallel import Group, join

PATIENCE_S = 60


def on_all_ranks(
    size: int, store: Path, function: Callable[[Group], torch.Tensor]
) -> list[torch.Tensor]:
    """What a function of a rank's group returns on each; all meet over the file `store`."""
    found: dict[int, torch.Tensor] = {}

    @torch.inference_mode()
    def be(rank: int) -> None:
        group = join(str(store), rank, size, torch.device("cpu"), shared=False)
        found[rank] = function(group)

    threads = [threading.Thread(target=be, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    return [found[rank] for rank in range(size)]
