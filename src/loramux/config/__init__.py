"""Settings, one file per section. `resolve` fills every "auto" once and returns a new object."""

from loramux.config.engine import EngineConfig, ModelFacts, num_blocks, resolve
from loramux.config.lora import LoRAConfig
from loramux.config.server import ServerConfig

__all__ = ["EngineConfig", "LoRAConfig", "ModelFacts", "ServerConfig", "num_blocks", "resolve"]
