"""What the HTTP server is told at start."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator


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

    max_body_bytes: int = Field(default=16 << 20, ge=1024)
    """Largest request body."""

    shutdown_timeout_s: float = Field(default=30.0, ge=0)
    """How long running requests may go on after the signal to stop; then they get an error."""

    @model_validator(mode="after")
    def _root_with_updates(self) -> Self:
        if self.allow_runtime_lora_updating and not self.lora_root:
            raise ValueError(
                "allow_runtime_lora_updating needs lora_root: name the directory adapters may come from"
            )
        return self
