"""The LoRA configuration: vLLM's fields, names and defaults, each of them meaning something.

Torch-free: data types are carried as strings and become torch dtypes where tensors are made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from typing import Any, Literal, Protocol, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from loramux.config.media import Modality
from loramux.errors import ConfigError

logger = logging.getLogger(__name__)

LoRADtype = Literal["auto", "float32", "float16", "bfloat16"]

DUAL_STREAM_VARIABLE = "LORAMUX_LORA_ENABLE_DUAL_STREAM"

# Fields that decide what is computed, and so take part in compute_hash().
HASHED_FIELDS = (
    "max_lora_rank",
    "max_loras",
    "fully_sharded_loras",
    "lora_dtype",
    "target_modules",
    "enable_tower_connector_lora",
    "enable_vocabulary_lora",
    "max_lora_vocabulary_rows",
    "allow_partial_adapters",
    "specialize_active_lora",
    "enable_mixed_moe_lora_format",
    "enable_moe_shared_loras",
    "max_lora_cls_labels",
)

# Fields that do not: where weights come from and wait, which adapter a request gets by default, and what
# may be loaded at all.
UNHASHED_FIELDS = (
    "max_cpu_loras",
    "default_mm_loras",
    "default_mm_loras_policy",
    "max_registered_adapters",
    "max_adapter_bytes",
    "adapter_roots",
    "adapter_repositories",
    "resolver_timeout_s",
    "resolver_negative_ttl_s",
    "adapter_fetch_timeout_s",
    "max_adapter_download_bytes",
    "verify_adapters",
    "lora_tokenizers",
)

_REPOSITORY_PATTERN = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._*-]+(?:@[A-Za-z0-9][A-Za-z0-9._/-]*)?"
)

_warned_dual_stream = False


def _cuda_is_present() -> bool:
    """Whether this machine has an NVIDIA driver; told from its device files, since torch is not here."""
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/proc/driver/nvidia/version")


class ModelFactsLike(Protocol):
    """The part of a model's facts that this config is checked against."""

    @property
    def dtype(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def modalities(self) -> tuple[str, ...]: ...


class LoRAConfig(BaseModel):
    """How many adapters, how large, where they live and what they may touch.

    Field names and defaults are vLLM's. Unknown names are refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_lora_rank: int = Field(default=16, ge=1)
    """Largest rank `r` an adapter may have in any module. Any integer; a smaller adapter costs
    only its own rows, not this many."""

    max_loras: int = Field(default=1, ge=1)
    """How many different adapters one step may use. That many of the largest rank always fit on
    the device; more stay resident when they are smaller."""

    fully_sharded_loras: bool = False
    """Shard both LoRA factors over the tensor-parallel ranks instead of one of them: less memory
    a rank, and less work for long inputs or large ranks, for one more small collective."""

    max_cpu_loras: int | None = Field(default=None, ge=1)
    """How many adapters are kept ready in host memory (least recently used goes first). At least
    `max_loras`, which is also the default. More may be registered: they are read again."""

    lora_dtype: LoRADtype = "auto"
    """Data type in which adapters are stored and multiplied; `auto` takes the model's."""

    target_modules: list[str] | None = None
    """Serve LoRA on these modules only, by suffix (`q_proj`, `self_attn.o_proj`) or full name.
    An adapter that touches another module is refused. None: every linear layer."""

    default_mm_loras: dict[Modality, str] | None = None
    """Modality to adapter path, as in `{"image": "path", "audio": "path"}`: the adapter of a request
    that carries this modality and names no adapter itself. They are read at start."""

    default_mm_loras_policy: Literal["compose", "refuse", "none"] = "compose"
    """What a request gets that carries several modalities with different adapters: their sum, a refusal,
    or the base model as in vLLM."""

    enable_tower_connector_lora: bool = False
    """Serve adapters on the vision or audio tower and on the connector of multimodal models. Off: an
    adapter that touches them is refused."""

    enable_vocabulary_lora: bool = False
    """Serve LoRA on the input embedding and on the output head, for which the adapter pool then has
    room. Off: an adapter that has it is refused. No field of vLLM's."""

    max_lora_vocabulary_rows: int = Field(default=0, ge=0)
    """Most rows of the embedding, and of the output head, that one adapter may have of its own: trained
    tokens, added tokens, and those rows of a full copy that differ from the base model's. Each of
    `max_loras` places has room for so many. 0: such an adapter is refused, by a message that says how
    many it needs. No field of vLLM's."""

    allow_partial_adapters: bool = False
    """Serve adapters that touch a tower or a connector where that is not served, without that part:
    their answers are then not those of the whole adapter. A line in the log says what is left out.
    No field of vLLM's."""

    specialize_active_lora: bool = False
    """Capture CUDA graphs for several counts of active adapters instead of one for all."""

    enable_mixed_moe_lora_format: bool = False
    """Serve every layout of mixture-of-experts adapters in one deployment and one batch. Off: only the
    one that is natural to the model, and adapters in another are refused."""

    enable_moe_shared_loras: bool = False
    """Serve, beside the layout natural to the model, adapters whose experts share a factor: one A for
    gate and up of all experts, one B for down."""

    max_lora_cls_labels: int | None = Field(default=None, ge=1)
    """Most labels of an adapter's own classification head; one with more is refused. Heads are not
    padded to it: each takes what it needs, in host memory. None: any number."""

    max_registered_adapters: int | None = Field(default=None, ge=1)
    """Most adapter names served at once; one more is refused. None: any number."""

    max_adapter_bytes: int | None = Field(default=None, ge=1)
    """Largest `adapter_model.safetensors`; a larger one is refused before it is opened. None: what
    `max_lora_rank` allows, and 2 GiB for one that comes in the body of a request."""

    adapter_roots: list[str] | None = None
    """Look up adapters that are not known yet: the name `a/b` is the folder `a/b` below one of these
    directories or URLs, the first that has it, and is loaded on first use. Links may not leave their
    directory. None: off."""

    adapter_repositories: list[str] | None = None
    """Look up adapters that are not known yet on the Hugging Face Hub, where their name fits one of
    these: `org/*`, `org/name`, or with a revision `org/*@v1`. None: off."""

    resolver_timeout_s: float = Field(default=60.0, gt=0)
    """How long a request waits for an adapter that is looked up and loaded; the load goes on."""

    resolver_negative_ttl_s: float = Field(default=30.0, ge=0)
    """How long it is remembered that a name was not found or its adapter was refused."""

    adapter_fetch_timeout_s: float = Field(default=300.0, gt=0)
    """How long the download of one adapter may take."""

    max_adapter_download_bytes: int = Field(default=8 << 30, ge=1)
    """Largest adapter that is downloaded, all its files together."""

    verify_adapters: bool = False
    """Compare each adapter that is loaded with what its file says, read and computed a second way in
    float64, and refuse it where they differ."""

    lora_tokenizers: Literal["auto", "base"] = "auto"
    """Whose tokenizer and chat template requests with an adapter get. `auto`: the adapter's own, where
    its folder has one that is not the base model's. `base`: always the base model's; those of adapters
    are then not read. No field of vLLM's."""

    @field_validator("adapter_roots", "adapter_repositories")
    @classmethod
    def _lookups_named(cls, value: list[str] | None, info: ValidationInfo) -> list[str] | None:
        name = str(info.field_name)
        if value is not None and (not value or not all(item.strip() for item in value)):
            raise ValueError(f"{name} must name at least one; leave it out for none")
        if name == "adapter_repositories":
            for pattern in value or ():
                if not _REPOSITORY_PATTERN.fullmatch(pattern):
                    raise ValueError(
                        f"adapter_repositories {pattern!r} is not of the form org/*, org/name or "
                        "org/*@revision; the organisation is written out"
                    )
        return value

    @field_validator("lora_dtype", mode="before")
    @classmethod
    def _dtype_name(cls, value: Any) -> Any:
        """Accept torch dtypes by their name, without importing torch, and None for `auto`."""
        if value is None:
            return "auto"
        name = str(value)
        return name.removeprefix("torch.") if name.startswith("torch.") else value

    @field_validator("target_modules")
    @classmethod
    def _targets_named(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and (not value or not all(name.strip() for name in value)):
            raise ValueError("target_modules must name at least one module; leave it out for all")
        return value

    @field_validator("default_mm_loras", mode="before")
    @classmethod
    def _modalities_known(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = get_args(Modality)
        unknown = [str(name) for name in value if name not in known]
        if unknown:
            raise ValueError(
                f"default_mm_loras names {', '.join(map(repr, unknown))}, and there are "
                f"{', '.join(known)}"
            )
        empty = [name for name, path in value.items() if not path]
        if empty:
            raise ValueError(f"default_mm_loras has no path for {', '.join(empty)}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _fill_max_cpu_loras(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("max_cpu_loras") is None:
            data = {**data, "max_cpu_loras": data.get("max_loras", 1)}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.host_capacity < self.max_loras:
            raise ValueError(
                f"max_cpu_loras ({self.max_cpu_loras}) must be >= max_loras "
                f"({self.max_loras}): an adapter on the device is also kept on the host"
            )
        self.dual_stream("cuda" if _cuda_is_present() else "cpu")
        return self

    @property
    def host_capacity(self) -> int:
        """`max_cpu_loras` with its default filled in."""
        return self.max_loras if self.max_cpu_loras is None else self.max_cpu_loras

    @property
    def resolves(self) -> bool:
        """Whether names that are not known are looked up."""
        return bool(self.adapter_roots or self.adapter_repositories)

    @property
    def changes_vocabulary(self) -> bool:
        """Whether adapters may change the embedding or the output head."""
        return self.enable_vocabulary_lora or self.max_lora_vocabulary_rows > 0

    def compute_hash(self) -> str:
        """Hex digest of every field that changes what is computed, equal in every process.

        Keys the caches of tuning results and captured graphs.
        """
        factors = {name: getattr(self, name) for name in HASHED_FIELDS}
        if factors["target_modules"] is not None:
            factors["target_modules"] = sorted(set(factors["target_modules"]))
        return hashlib.sha256(json.dumps(factors, sort_keys=True).encode()).hexdigest()

    def dual_stream(self, device: str) -> bool:
        """Whether the shrink runs on a second CUDA stream, as `LORAMUX_LORA_ENABLE_DUAL_STREAM` asks.

        Raises ConfigError where there is no CUDA. Off, with one warning, under
        `fully_sharded_loras`, whose collectives need the shrink in order. The environment is only
        read, never written.
        """
        global _warned_dual_stream
        if os.environ.get(DUAL_STREAM_VARIABLE, "0").strip().lower() not in ("1", "true", "yes"):
            return False
        if not device.startswith("cuda"):
            raise ConfigError(
                f"{DUAL_STREAM_VARIABLE} is set, but the device is {device!r}",
                field=DUAL_STREAM_VARIABLE,
                remedy=f"unset {DUAL_STREAM_VARIABLE}: dual streams exist on CUDA only",
            )
        if self.fully_sharded_loras:
            if not _warned_dual_stream:
                logger.warning(
                    "%s has no effect with fully_sharded_loras and is treated as off",
                    DUAL_STREAM_VARIABLE,
                )
                _warned_dual_stream = True
            return False
        return True

    def verify_with_model_config(self, model: ModelFactsLike) -> LoRAConfig:
        """Check this config against the model and device and fill in `lora_dtype`.

        Returns a new object; this one stays as the user wrote it. Raises ConfigError.
        """
        self._check_defaults(model.modalities)
        self.dual_stream(model.device)  # raises where it cannot be had
        dtype = model.dtype if self.lora_dtype == "auto" else self.lora_dtype
        return self.model_copy(update={"lora_dtype": dtype})

    @property
    def most_defaults(self) -> int:
        """Most adapters of `default_mm_loras` that one request can get."""
        paths = {os.path.abspath(path) for path in (self.default_mm_loras or {}).values()}
        return len(paths) if self.default_mm_loras_policy == "compose" else min(1, len(paths))

    def _check_defaults(self, modalities: Sequence[str]) -> None:
        """Raise ConfigError where `default_mm_loras` asks for more than the model or the pool has."""
        named = self.default_mm_loras or {}
        reasons, remedies = [], []
        if foreign := sorted(set(named) - set(modalities)):
            takes = (
                f"takes {' and '.join(modalities)} beside text" if modalities else "is a text model"
            )
            reasons.append(f"default_mm_loras names {', '.join(foreign)}, and the model {takes}")
            remedies.append(f"leave out {', '.join(foreign)}")
        if self.most_defaults > self.max_loras:
            reasons.append(
                f"a request may get {self.most_defaults} adapters of default_mm_loras at once, and "
                f"max_loras is {self.max_loras}"
            )
            remedies.append(
                f"raise --max-loras to {self.most_defaults}, or choose another --default-mm-loras-policy"
            )
        if reasons:
            raise ConfigError(
                "; ".join(reasons), field="default_mm_loras", remedy="; ".join(remedies)
            )
