"""One EngineConfig from keyword arguments without sections, as `LLM` takes them."""

from __future__ import annotations

from typing import Any

from loramux.config.engine import EngineConfig
from loramux.config.limits import quotas_among
from loramux.config.lora import LoRAConfig
from loramux.config.media import MediaConfig
from loramux.config.neutral import drop_neutral
from loramux.config.other_names import other_names
from loramux.errors import ConfigError


def engine_config(model: str, *, enable_lora: bool = False, **settings: Any) -> EngineConfig:
    """An EngineConfig from flat keyword arguments; unknown names are refused, all at once."""
    lora_fields, media_fields, engine_fields = (
        {*config.model_fields, *other_names(config.model_fields)}
        for config in (LoRAConfig, MediaConfig, EngineConfig)
    )
    settings = drop_neutral(settings)
    unknown = sorted(set(settings) - lora_fields - media_fields - engine_fields)
    if unknown:
        raise ConfigError(f"unknown settings: {', '.join(unknown)}", field=unknown[0])
    lora_settings = {k: v for k, v in settings.items() if k in lora_fields}
    if lora_settings and not enable_lora:
        raise ConfigError(
            f"{', '.join(sorted(lora_settings))} set without enable_lora",
            field="enable_lora",
            remedy="add enable_lora=True",
        )
    lora = LoRAConfig(**lora_settings) if enable_lora else None
    media_settings = {k: v for k, v in settings.items() if k in media_fields}
    if media_settings and "media" in settings:
        raise ConfigError(
            f"{', '.join(sorted(media_settings))} and media are set", field="media", remedy="choose"
        )
    rest: dict[str, Any] = {k: v for k, v in settings.items() if k in engine_fields and k != "lora"}
    if isinstance(rest.get("served_model_name"), str):
        rest["served_model_name"] = [rest["served_model_name"]]
    if media_settings:
        rest["media"] = MediaConfig(**media_settings)
    config = EngineConfig(model=model, lora=lora or settings.get("lora"), **rest)
    check_weights_only(config)
    return config


def check_weights_only(config: EngineConfig) -> None:
    """Raise ConfigError where `adapter_limits` would refuse requests: offline nobody asks again."""
    if faults := quotas_among(config.adapter_limits):
        raise ConfigError(
            f"adapter_limits: {'; '.join(faults)}, and only a server refuses requests",
            field="adapter_limits",
            remedy="leave weights only",
        )
