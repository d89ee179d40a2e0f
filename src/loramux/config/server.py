"""What the HTTP server is told at start."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from loramux.config.media import MediaConfig

TEXT_BODY_BYTES = 16 << 20


class ServerConfig(BaseModel):
    """Where the server listens and what its clients may do."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on; loopback unless told otherwise."""

    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""

    api_key: SecretStr | None = None
    """If set, every `/v1` request must carry it as a bearer token. `loramux serve` also takes it from
    `LORAMUX_API_KEY`, where no list of processes shows it."""

    allow_runtime_lora_updating: bool = False
    """Serve `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`. Needs `lora_root`."""

    lora_root: str | None = None
    """The only directory from which adapters may be loaded over HTTP; links may not leave it."""

    max_body_bytes: int | None = Field(default=None, ge=1024)
    """Largest request body. Default: 16 MiB; for a model that takes media, as many more as one item of
    `max_media_bytes` has in base64, which is 58.7 MiB with the default of that. A body that is larger
    with all its items can name them by URL instead."""

    shutdown_timeout_s: float = Field(default=30.0, ge=0)
    """How long running requests may go on after the signal to stop; then they get an error."""

    @model_validator(mode="after")
    def _root_with_updates(self) -> Self:
        if self.allow_runtime_lora_updating and not self.lora_root:
            raise ValueError(
                "allow_runtime_lora_updating needs lora_root: name the directory adapters may come from"
            )
        return self

    def body_limit(self, media: MediaConfig | None) -> int:
        """Most bytes of a request's body; `media` are the limits of a model that takes any."""
        if self.max_body_bytes is not None:
            return self.max_body_bytes
        encoded = 0 if media is None else -(-media.max_media_bytes // 3) * 4
        return TEXT_BODY_BYTES + encoded
