"""How many copies of the server run on a Ray cluster, and when there are more or fewer."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loramux.config.engine import EngineConfig
from loramux.config.limits import quotas_among
from loramux.errors import ConfigError

SCALING = ("target_ongoing_requests", "upscale_delay_s", "downscale_delay_s")
RANGE = ("min_replicas", "max_replicas")
PLACEMENT = ("cpus_per_replica", "ray_address")


class ReplicaConfig(BaseModel):
    """Replicas on Ray Serve. Names and meanings are Ray Serve's where it has the setting."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    replicas: int | None = Field(default=None, ge=1)
    """Serve this many copies of the model on Ray, each with adapters of its own choice on its device.
    Needs `loramux[ray]`. Default: one server, without Ray."""

    min_replicas: int | None = Field(default=None, ge=1)
    """With `max_replicas`, instead of `replicas`: the fewest copies. Default: 1."""

    max_replicas: int | None = Field(default=None, ge=1)
    """The most copies; Ray starts and drains them as the queues grow and shrink."""

    target_ongoing_requests: float | None = Field(default=None, gt=0)
    """Running and waiting requests of a replica to scale towards. Default: half of `max_num_seqs`."""

    upscale_delay_s: float | None = Field(default=None, ge=0)
    """How long queues must be too long before a replica is added, in seconds. Default: 30."""

    downscale_delay_s: float | None = Field(default=None, ge=0)
    """How long they must be short before a replica is drained, in seconds. Default: 600."""

    cpus_per_replica: float | None = Field(default=None, gt=0)
    """CPU cores that Ray keeps for one replica. Default: 1 beside a GPU; without one, this machine's
    cores over the number of replicas, and at least 1."""

    ray_address: str | None = None
    """The Ray cluster to join: `auto`, `host:port` or `ray://host:port`. Default: `RAY_ADDRESS`, and
    without that a Ray of its own on this machine."""

    @model_validator(mode="after")
    def _one_way_to_count(self) -> Self:
        set_of_range = [name for name in RANGE if getattr(self, name) is not None]
        if self.replicas is not None and set_of_range:
            raise ValueError(
                f"replicas fixes the number, and {', '.join(set_of_range)} would change it: "
                "give replicas, or min_replicas and max_replicas"
            )
        if self.min_replicas is not None and self.max_replicas is None:
            raise ValueError("min_replicas needs max_replicas")
        if self.max_replicas is not None and self.fewest > self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) is more than max_replicas ({self.max_replicas})"
            )
        needless = [name for name in SCALING if getattr(self, name) is not None]
        if needless and self.max_replicas is None:
            raise ValueError(f"{', '.join(needless)}: only max_replicas lets the number change")
        placed = [name for name in PLACEMENT if getattr(self, name) is not None]
        if placed and not self.on_ray:
            raise ValueError(f"{', '.join(placed)}: needs replicas or max_replicas")
        return self

    @property
    def on_ray(self) -> bool:
        return self.replicas is not None or self.max_replicas is not None

    @property
    def fewest(self) -> int:
        return self.replicas or self.min_replicas or 1

    @property
    def most(self) -> int:
        return self.replicas or self.max_replicas or 1

    def check_engine(self, config: EngineConfig) -> None:
        """Raise ConfigError where the engine's settings and replicas exclude each other."""
        if config.device.startswith("cuda:"):
            raise ConfigError(
                f"device {config.device!r} names one GPU, and each replica gets its own from Ray",
                field="device",
                remedy="use --device cuda",
            )
        if faults := quotas_among(config.adapter_limits):
            raise ConfigError(
                f"adapter_limits: {'; '.join(faults)}, and replicas do not count together",
                field="adapter_limits",
                remedy="leave weights only, which hold in each replica",
            )
