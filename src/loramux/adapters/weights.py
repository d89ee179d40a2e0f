"""An adapter in host memory, in the layout in which it goes to the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loramux.types import AdapterRef


@dataclass(frozen=True, slots=True)
class LoRAPair:
    """Both factors of one module: delta(x) = scale * (x @ a.T) @ b.

    `a` [r, in], `b` [r, out] (PEFT's lora_B transposed, so that a rank row is contiguous),
    `scale` the adapter's own alpha/r factor, applied in fp32.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def r(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """One version of an adapter: module name -> factors."""

    ref: AdapterRef
    pairs: dict[str, LoRAPair]
