"""Which runner a device gets."""

from __future__ import annotations

from loramux.config import EngineConfig, ModelFacts
from loramux.engine.cpu_runner import CpuRunner
from loramux.engine.runner import Runner
from loramux.models.attach import Attached


def make_runner(attached: Attached, config: EngineConfig, facts: ModelFacts) -> Runner:
    """The runner for `attached`'s device. Raises ConfigError when the memory does not suffice."""
    if attached.device.type == "cpu":
        return CpuRunner(attached, config, facts)
    from loramux.engine.gpu_runner import GpuRunner

    return GpuRunner(attached, config, facts)
