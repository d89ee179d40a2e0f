"""How much memory a device has, and one place that knows what running out of it looks like."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from loramux.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes. `total` is 0 for a CPU, whose memory is not ours to share out."""

    free: int
    total: int = 0


def device_memory(device: str) -> DeviceMemory:
    """What `device` has now; what torch's allocator holds without need is given back first."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(free, total)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return DeviceMemory(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError):
        return DeviceMemory(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the device, or the host, had no memory: torch's own error, or a library's words."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )


@contextmanager
def refused_when_full(device: str, refusal: Callable[[int], ConfigError]) -> Iterator[None]:
    """Turn running out of memory inside into `refusal(bytes that were free before)`."""
    free = device_memory(device).free
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error) and not is_out_of_memory(error.__cause__):
            raise
        raise refusal(free) from error
