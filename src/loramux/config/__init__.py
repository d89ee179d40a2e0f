"""Settings, one file per section. `resolve` fills every "auto" once and returns a new object."""

from loramux.config.engine import EngineConfig, num_blocks, resolve
from loramux.config.facts import ModelFacts
from loramux.config.lora import LoRAConfig
from loramux.config.media import MediaConfig
from loramux.config.memory import MemoryPlan, plan_memory
from loramux.config.replicas import ReplicaConfig
from loramux.config.server import ServerConfig

__all__ = [
    "EngineConfig",
    "LoRAConfig",
    "MediaConfig",
    "MemoryPlan",
    "ModelFacts",
    "ReplicaConfig",
    "ServerConfig",
    "num_blocks",
    "plan_memory",
    "resolve",
]
