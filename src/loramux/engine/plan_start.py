"""The memory plan of a start that has not happened: from the model's configuration alone."""

from __future__ import annotations

from loramux.config import EngineConfig, MemoryPlan, plan_memory, resolve
from loramux.models.device_memory import DeviceMemory, device_memory
from loramux.models.loader import facts_before_loading, pick_device

DRIVER_BYTES = 600 << 20  # what CUDA keeps on a GPU before anybody asks for memory


def plan_before_start(config: EngineConfig, total_bytes: int | None = None) -> MemoryPlan:
    """What an engine with `config` would take, without loading a weight.

    `total_bytes` is the memory of a device that is not here: a GPU's, unless `config.device` is
    `cpu`. Raises ConfigError and UnsupportedModel as that start would."""
    if total_bytes is None:
        device = pick_device(config.device)
        memory = device_memory(device)
    elif config.device == "cpu":
        device, memory = "cpu", DeviceMemory(total_bytes)
    else:
        device = "cuda" if config.device == "auto" else config.device
        memory = DeviceMemory(max(0, total_bytes - DRIVER_BYTES), total_bytes)
    facts = facts_before_loading(config, memory, device)
    return plan_memory(resolve(config, facts), facts)
