"""loramux: one base model, hundreds of LoRA adapters, one process.

The public names; each is imported when it is first used, so that `import loramux` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramux.config import EngineConfig, LoRAConfig, ServerConfig
    from loramux.errors import (
        AdapterRejected,
        ConfigError,
        LoramuxError,
        RequestError,
        UnsupportedModel,
    )
    from loramux.llm import LLM, CompletionOutput, RequestOutput
    from loramux.offline_arguments import LoRARequest
    from loramux.types import PoolingParams, SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "AdapterRejected": "errors",
    "CompletionOutput": "llm",
    "ConfigError": "errors",
    "EngineConfig": "config",
    "LLM": "llm",
    "LoRAConfig": "config",
    "LoRARequest": "offline_arguments",
    "LoramuxError": "errors",
    "PoolingParams": "types",
    "RequestError": "errors",
    "RequestOutput": "llm",
    "SamplingParams": "types",
    "ServerConfig": "config",
    "UnsupportedModel": "errors",
}

__all__ = [
    "LLM",
    "AdapterRejected",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "LoRAConfig",
    "LoRARequest",
    "LoramuxError",
    "PoolingParams",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "ServerConfig",
    "UnsupportedModel",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loramux' has no attribute {name!r}")
    return getattr(import_module(f"loramux.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
