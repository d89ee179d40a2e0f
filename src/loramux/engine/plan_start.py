"""The memory plan of a start that has not happened: from the model's configuration alone."""

from __future__ import annotations

from loramux.config import EngineConfig, MemoryPlan, ModelFacts, plan_memory, resolve
from loramux.config.memory import adapter_pool_bytes
from loramux.engine.leading import rank_devices, sharing
from loramux.models.device_memory import DeviceMemory, device_memory
from loramux.models.loader import facts_before_loading, pick_device

DRIVER_BYTES = 600 << 20  # what CUDA keeps on a GPU before anybody asks for memory


def plan_before_start(config: EngineConfig, total_bytes: int | None = None) -> MemoryPlan:
    """What an engine with `config`, or each of its ranks, would take, without loading a weight.

    `total_bytes` is the memory of a device that is not here: of a rank's GPU, or, where
    `config.device` is `cpu`, of all ranks. Raises as that start would."""
    facts = _facts(config, total_bytes)
    return plan_memory(resolve(config, facts), facts)


def other_pool_bytes(config: EngineConfig, total_bytes: int | None = None) -> int | None:
    """Bytes of a rank's adapter pool under the other LoRA sharding; None where there is but one."""
    if config.tensor_parallel_size == 1 or config.lora is None:
        return None
    fully = not config.lora.fully_sharded_loras
    lora = config.lora.model_copy(update={"fully_sharded_loras": fully})
    other = config.model_copy(update={"lora": lora})
    return adapter_pool_bytes(lora, _facts(other, total_bytes))


def _facts(config: EngineConfig, total_bytes: int | None) -> ModelFacts:
    """Of the model on what a rank has of its device."""
    size = config.tensor_parallel_size
    if total_bytes is None:
        devices = rank_devices(config) if size > 1 else [pick_device(config.device)]
        device, memory = devices[0], device_memory(devices[0])
    elif config.device == "cpu":
        device, devices, memory = "cpu", ["cpu"] * size, DeviceMemory(total_bytes)
    else:
        device = "cuda" if config.device == "auto" else config.device
        devices = [f"cuda:{rank}" for rank in range(size)]
        memory = DeviceMemory(max(0, total_bytes - DRIVER_BYTES), total_bytes)
    ranks = sharing(devices)
    own = DeviceMemory(memory.free // ranks, memory.total // ranks)
    return facts_before_loading(config, own, device)
