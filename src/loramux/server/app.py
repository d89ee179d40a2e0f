"""The application: routes, gates and error handlers around one engine."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

from loramux.config import ServerConfig
from loramux.config.server import PUSHED_BYTES
from loramux.errors import ConfigError
from loramux.server import (
    admin,
    chat,
    classify,
    completions,
    embeddings,
    health,
    models,
    pushed,
    residency,
)
from loramux.server.access import Keyring
from loramux.server.errors import install_handlers
from loramux.server.gate import ApiKeyGate, BodyLimit
from loramux.server.media_loading import MediaLoading
from loramux.server.metrics import Metrics
from loramux.server.quotas import Quotas
from loramux.server.state import ServerState

if TYPE_CHECKING:  # importing the engine for real would import torch
    from loramux.engine.service import AsyncEngine


def create_app(
    engine: AsyncEngine, config: ServerConfig | None = None, *, owns_engine: bool = True
) -> FastAPI:
    """The ASGI application. Nothing is global: two apps in one process do not meet.

    With `owns_engine` its lifespan starts the engine and at the end stops it, giving running
    requests `shutdown_timeout_s`. Raises ConfigError when `lora_root` is no directory, or
    the file of keys cannot be read.
    """
    config = config or ServerConfig()
    if config.lora_root is not None and not os.path.isdir(config.lora_root):
        raise ConfigError(
            f"lora_root {config.lora_root!r} is no directory",
            field="lora_root",
            remedy="create it, or name another with --lora-root",
        )
    keys = Keyring.of(config)
    media = engine.config.media
    quotas = Quotas(engine.config)
    state = ServerState(engine, config, Metrics(engine), MediaLoading(media), quotas)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if owns_engine:
            await engine.start()
        try:
            yield
        finally:
            state.draining = True
            state.media.close()
            if owns_engine:
                await engine.stop(config.shutdown_timeout_s)

    # The pages at /docs would load their scripts from another host.
    app = FastAPI(
        title="loramux", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.loramux = state
    for part in (completions, chat, embeddings, classify, models, admin, residency, pushed, health):
        app.include_router(part.router)
    install_handlers(app)
    limit = config.body_limit(media if engine.modalities else None)
    lora = engine.config.lora
    pushed_bytes = (lora.max_adapter_bytes if lora else None) or PUSHED_BYTES
    app.add_middleware(BodyLimit, max_bytes=limit, pushed_bytes=pushed_bytes)
    if keys:
        # Added last, so it stands before the body limit.
        app.add_middleware(ApiKeyGate, keys=keys)
    return app
