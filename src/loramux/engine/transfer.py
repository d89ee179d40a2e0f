"""Between host and device without waiting for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[Any]]

ALIGNMENT = 16  # bytes: what kernels may count on


def upload(device: torch.device, *arrays: Array) -> list[torch.Tensor]:
    """The arrays as tensors on `device`, brought there by one copy."""
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + -(-array.nbytes // ALIGNMENT) * ALIGNMENT)
    # Only what lies in pinned memory is copied while the host goes on.
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, array in zip(starts, arrays, strict=False):
        flat = np.ascontiguousarray(array).reshape(-1)
        host.numpy()[start : start + array.nbytes] = flat.view(np.uint8)
    moved = host.to(device, non_blocking=True)  # [bytes]
    return [
        moved[start : start + array.nbytes].view(_dtype(array)).view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]


def _dtype(array: Array) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype


class Download:
    """Tensors on their way to the host; `wait` waits for them and for nothing later."""

    def __init__(self, *tensors: torch.Tensor):
        # A non-blocking copy to the host makes its target pinned.
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._arrived: torch.cuda.Event | None = None
        if tensors[0].device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[torch.Tensor]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copies
