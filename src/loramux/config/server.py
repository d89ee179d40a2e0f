"""What the HTTP server is told at start."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from loramux.config.keys import ApiKey, check_distinct, read_keys
from loramux.config.media import MediaConfig

PUSHED_BYTES = 2 << 30
TEXT_BODY_BYTES = 16 << 20


class ServerConfig(BaseModel):
    """Where the server listens and what its clients may do."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on; loopback unless told otherwise."""

    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""

    api_key: SecretStr | None = None
    """If set, every `/v1` request must carry it as a bearer token, or a key of `api_keys_file`. It may
    do everything. `loramux serve` also takes it from `LORAMUX_API_KEY`, where no list of processes shows
    it."""

    api_keys_file: str | None = None
    """A JSON file of keys, each with the adapters it may use and whether it may change them; it is read
    once, at start. `loramux serve` also takes it from `LORAMUX_API_KEYS_FILE`."""

    api_keys: tuple[ApiKey, ...] = ()
    """Such keys themselves, beside those of the file."""

    allow_runtime_lora_updating: bool = False
    """Serve `/v1/load_lora_adapter`, `/v1/unload_lora_adapter` and those that pin. Needs `lora_root`."""

    allow_adapter_push: bool = False
    """Serve `PUT /v1/adapters/NAME`, which takes an adapter's files in the request, and unloading and
    pinning."""

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

    @property
    def has_keys(self) -> bool:
        """Whether requests must carry a key."""
        return self.api_key is not None or self.api_keys_file is not None or bool(self.api_keys)

    def all_keys(self) -> tuple[ApiKey, ...]:
        """Those of `api_keys` and of the file. Raises ConfigError."""
        read = read_keys(self.api_keys_file) if self.api_keys_file is not None else ()
        keys = (*self.api_keys, *read)
        check_distinct(keys)
        return keys

    def with_keys_read(self) -> Self:
        """The same for where the file is not: its keys are here, as hashes. Raises ConfigError."""
        return self.model_copy(update={"api_keys": self.all_keys(), "api_keys_file": None})

    def body_limit(self, media: MediaConfig | None) -> int:
        """Most bytes of a request's body; `media` are the limits of a model that takes any."""
        if self.max_body_bytes is not None:
            return self.max_body_bytes
        encoded = 0 if media is None else -(-media.max_media_bytes // 3) * 4
        return TEXT_BODY_BYTES + encoded
