"""Everything the engine is told at start, and the one place where every "auto" becomes a value."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from loramux.config.facts import ModelFacts
from loramux.config.graphs import GPU_STEP, LARGEST
from loramux.config.limits import AdapterLimits, limits_of, read_limits
from loramux.config.lora import LoRAConfig
from loramux.config.media import MediaConfig
from loramux.config.memory import default_kv_bytes, most_kv_bytes
from loramux.config.memory_advice import kv_too_large, no_room_for_kv
from loramux.config.other_names import by_field_names
from loramux.config.sizes import parse_size
from loramux.errors import ConfigError

CPU_STEP = 512  # tokens

ModelDtype = Literal["auto", "float32", "float16", "bfloat16"]


class EngineConfig(BaseModel):
    """Model, memory and scheduling. Field names are vLLM's where vLLM has the field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str
    """Path of a local folder, or a Hugging Face Hub id."""

    tokenizer: str | None = None
    """Where the tokenizer comes from, if not from `model`."""

    revision: str | None = None
    """Branch, tag or commit of a Hub model."""

    served_model_name: list[str] | None = None
    """Names under which requests may ask for the base model; default: `model` itself."""

    dtype: ModelDtype = "auto"
    """Data type of weights and activations; `auto` takes what the checkpoint declares."""

    device: str = "auto"
    """`auto` (the GPU when there is one), `cpu`, `cuda` or `cuda:N`."""

    tensor_parallel_size: int = Field(default=1, ge=1, le=64)
    """Ranks that share each layer, one process and one GPU each (on a CPU: some of the cores each)."""

    rank_timeout_s: float = Field(default=60.0, ge=1)
    """How long a rank may give no sign of life, and a step or a load may stand still, in seconds, with
    several ranks; then all end with an error. A step that is slow and goes on is no matter."""

    disable_custom_all_reduce: bool = False
    """With several GPUs: let NCCL carry everything. Otherwise they write small tensors into each other's
    memory, where they can, which takes a quarter to half of the time."""

    seed: int = 0
    """Seed of the requests that bring none."""

    max_model_len: int | None = Field(default=None, ge=1)
    """Longest prompt plus answer in tokens; default: what the model was made for."""

    block_size: int = Field(default=16, ge=1, le=256)
    """Tokens in one block of the KV cache."""

    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    """Size of the KV cache, in bytes or as `40GiB`; also under the name `kv_cache_memory`. More than
    is free is refused. Default on a CPU: a quarter of the free memory, 4 GiB at most; on a GPU: what
    `gpu_memory_utilization` leaves beside weights, adapters, activations and graphs."""

    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of the GPU's memory for weights, adapters, KV cache, activations and graphs together. The
    driver's own part (about half a GiB) and other processes are not in it."""

    enable_prefix_caching: bool = True
    """Keep the KV blocks of finished requests and reuse them for equal prefixes."""

    max_num_seqs: int = Field(default=256, ge=1)
    """Most requests in one step."""

    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    """Most tokens in one step; longer prompts are prefilled in chunks. Default: 512 on a CPU,
    8192 on a GPU."""

    encoder_cache_tokens: int | None = Field(default=None, ge=1)
    """Tokens of images, sounds and videos whose vectors are kept on the device, so that media seen again
    are not encoded again. One item may have no more. Default: four times `max_num_batched_tokens`."""

    max_queue_len: int = Field(default=4096, ge=1)
    """Most waiting requests; one more is refused with 429."""

    async_scheduling: bool | None = None
    """Plan and launch the next step while one runs; default: on a GPU yes, on a CPU no."""

    adapter_patience_s: float = Field(default=2.0, ge=0)
    """How long a request may wait for a place for its adapter, in seconds, before running ones of
    other adapters are put back for it: those that came later, and earlier ones that had their turn,
    which is as long where few run and longer where many would have to be computed again."""

    adapter_limits: dict[str, AdapterLimits] | None = None
    """What adapters may take, by name, as in `{"team-a/*": {"weight": 2, "max_concurrency": 16}, "*":
    {"requests_per_minute": 600}}`: see [limits](server.md#limits). `*` stands for any characters, and
    the first pattern that fits counts; the base model goes by its own names. `LLM` takes weights
    only."""

    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    """`safetensors` refuses other weight files; `dummy` reads none and fills the model with random
    weights, for benchmarks."""

    enforce_eager: bool = False
    """Launch every kernel of a step on its own instead of replaying CUDA graphs."""

    cudagraph_capture_sizes: list[int] | None = None
    """Sizes in tokens, 1 to 1024, of the steps that are captured as CUDA graphs at start; default: up
    to 1024, close together where a step has one token of each sequence. Larger steps run without."""

    chat_template: str | None = None
    """A Jinja chat template, or the path of one, instead of the tokenizer's."""

    lora: LoRAConfig | None = None
    """The LoRA configuration; None serves the base model alone."""

    media: MediaConfig = Field(default_factory=MediaConfig)
    """Where media may come from and how large they may be; for models that take any."""

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, data: Any) -> Any:
        """Take a field under its second name; under both only with one value."""
        return by_field_names(data, cls.model_fields)

    @field_validator("cudagraph_capture_sizes")
    @classmethod
    def _captured(cls, sizes: list[int] | None) -> list[int] | None:
        wrong = [size for size in sizes or () if not 1 <= size <= LARGEST]
        if wrong:
            raise ValueError(f"{wrong}: graphs are made for steps of 1 to {LARGEST} tokens")
        return sizes

    @field_validator("adapter_limits", mode="before")
    @classmethod
    def _limits(cls, value: Any) -> Any:
        return None if value is None else read_limits(value)

    @field_validator("kv_cache_memory_bytes", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        return parse_size(value) if isinstance(value, str) else value

    @property
    def model_names(self) -> list[str]:
        return self.served_model_name or [self.model]

    def limits_of(self, adapter: str) -> AdapterLimits:
        """What this adapter may take; "" is the base model."""
        return limits_of(self.adapter_limits, adapter, self.model_names)

    @property
    def row_granule(self) -> int:
        """Rank rows of an adapter come in multiples of this: one on each rank, where A is dealt out."""
        fully = self.lora is not None and self.lora.fully_sharded_loras
        return self.tensor_parallel_size if fully else 1


def resolve(config: EngineConfig, facts: ModelFacts) -> EngineConfig:
    """Turn every "auto" into a value, once, in an order in which each step has what it needs.

    Returns a new config; raises ConfigError with the field and the remedy.
    """
    length = _resolve_length(config, facts)
    on_gpu = facts.on_gpu
    tokens = config.max_num_batched_tokens or (GPU_STEP if on_gpu else CPU_STEP)
    lora = config.lora.verify_with_model_config(facts) if config.lora else None
    run_ahead = on_gpu if config.async_scheduling is None else config.async_scheduling
    resolved = config.model_copy(
        update={
            "dtype": facts.dtype,
            "device": facts.device,
            "max_model_len": length,
            "max_num_batched_tokens": tokens,
            "async_scheduling": run_ahead,
            "encoder_cache_tokens": _resolve_encoder_cache(config, facts, tokens),
            "lora": lora,
        }
    )
    kv_bytes = _resolve_kv_bytes(resolved, facts)
    # No more than every sequence at full length could ever fill.
    most = (length + config.block_size) * config.max_num_seqs * facts.kv_bytes_per_token
    kv_bytes = min(kv_bytes, most)
    needed = (length + config.block_size) * facts.kv_bytes_per_token
    if kv_bytes < needed:
        length = _shrink_length(config, facts, kv_bytes)
    return resolved.model_copy(update={"max_model_len": length, "kv_cache_memory_bytes": kv_bytes})


def step_tokens(config: EngineConfig, *, on_gpu: bool) -> int:
    """Most tokens of a step, before or after the config is resolved."""
    tokens = config.max_num_batched_tokens or (GPU_STEP if on_gpu else CPU_STEP)
    return max(tokens, config.max_num_seqs)


def num_blocks(config: EngineConfig, facts: ModelFacts) -> int:
    """Blocks that the KV budget of a resolved config pays for."""
    assert config.kv_cache_memory_bytes is not None, "num_blocks needs a resolved config"
    return config.kv_cache_memory_bytes // (config.block_size * facts.kv_bytes_per_token)


def _resolve_length(config: EngineConfig, facts: ModelFacts) -> int:
    length = config.max_model_len or facts.max_positions
    if length > facts.max_positions:
        raise ConfigError(
            f"max_model_len {length} is beyond {facts.length_limit_reason} ({facts.max_positions})",
            field="max_model_len",
            remedy=f"use at most {facts.max_positions}",
        )
    return length


def _resolve_encoder_cache(config: EngineConfig, facts: ModelFacts, tokens: int) -> int | None:
    if facts.encoder is not None:
        return config.encoder_cache_tokens or 4 * tokens
    if config.encoder_cache_tokens is not None:
        raise ConfigError(
            "encoder_cache_tokens is set, and the model takes text alone",
            field="encoder_cache_tokens",
            remedy="leave out encoder_cache_tokens",
        )
    return None


def _resolve_kv_bytes(config: EngineConfig, facts: ModelFacts) -> int:
    """Bytes of the KV cache of a config that is resolved but for them. Raises ConfigError."""
    asked = config.kv_cache_memory_bytes
    most = most_kv_bytes(config, facts)
    if asked is None:
        if kv_bytes := default_kv_bytes(config, facts):
            return kv_bytes
        raise no_room_for_kv(config, facts)
    if asked > most:
        raise kv_too_large(config, facts, most)
    return asked


def _shrink_length(config: EngineConfig, facts: ModelFacts, kv_bytes: int) -> int:
    """Fit an unset max_model_len to the KV budget; refuse one that the user asked for."""
    fits = kv_bytes // facts.kv_bytes_per_token - config.block_size
    if config.max_model_len is not None or fits < 1:
        need = ((config.max_model_len or 1) + config.block_size) * facts.kv_bytes_per_token
        raise ConfigError(
            f"the KV cache of {kv_bytes} bytes cannot hold one sequence of "
            f"{config.max_model_len or 1} tokens, which takes {need} bytes",
            field="kv_cache_memory_bytes",
            remedy="raise --kv-cache-memory or lower --max-model-len",
        )
    return fits
