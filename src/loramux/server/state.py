"""What every route of one app shares."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from loramux.config import ServerConfig
from loramux.server.media_loading import MediaLoading
from loramux.server.metrics import Metrics
from loramux.server.quotas import Quotas

if TYPE_CHECKING:  # importing the engine for real would import torch
    from loramux.engine.service import AsyncEngine


@dataclass(slots=True)
class ServerState:
    """One app's engine, settings and counters.

    `draining` is set when the process has been told to stop; `started_s` is seconds since the epoch.
    """

    engine: AsyncEngine
    config: ServerConfig
    metrics: Metrics
    media: MediaLoading
    quotas: Quotas
    started_s: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False

    @property
    def context_length(self) -> int:
        """Most tokens of prompt plus answer."""
        length = self.engine.config.max_model_len
        assert length is not None, "the engine's config is resolved"
        return length


def state_of(request: Request) -> ServerState:
    state = request.app.state.loramux
    assert isinstance(state, ServerState)
    return state


State = Annotated[ServerState, Depends(state_of)]
