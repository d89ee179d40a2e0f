"""Everything the engine is told at start, and the one place where every "auto" becomes a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from loramux.config.lora import LoRAConfig
from loramux.config.sizes import parse_size
from loramux.errors import ConfigError

ModelDtype = Literal["auto", "float32", "float16", "bfloat16"]
GIB = 1 << 30

# Second names of fields -> the fields: vLLM's own name, and the shorter one.
OTHER_NAMES = {"kv_cache_memory": "kv_cache_memory_bytes"}


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

    max_queue_len: int = Field(default=4096, ge=1)
    """Most waiting requests; one more is refused with 429."""

    async_scheduling: bool | None = None
    """Plan and launch the next step while one runs; default: on a GPU yes, on a CPU no."""

    adapter_patience_s: float = Field(default=2.0, ge=0)
    """How long a request may wait for a place for its adapter, in seconds, before running ones
    of other adapters are put back for it."""

    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    """`safetensors` refuses other weight files; `dummy` reads none and fills the model with random
    weights, for benchmarks."""

    enforce_eager: bool = False
    """Launch every kernel of a decode step on its own instead of replaying CUDA graphs."""

    cudagraph_capture_sizes: list[int] | None = None
    """Batch sizes whose decode steps are captured as CUDA graphs at start; default: up to
    `max_num_seqs`, close together where they are small. Larger batches run without."""

    chat_template: str | None = None
    """A Jinja chat template, or the path of one, instead of the tokenizer's."""

    lora: LoRAConfig | None = None
    """The LoRA configuration; None serves the base model alone."""

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, data: Any) -> Any:
        """Take a field under its second name; under both only with one value."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for other, name in OTHER_NAMES.items():
            if other in data:
                value = data.pop(other)
                if data.get(name, value) != value:
                    raise ValueError(f"{other} and {name} are one setting; give one of them")
                data[name] = value
        return data

    @field_validator("kv_cache_memory_bytes", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        return parse_size(value) if isinstance(value, str) else value

    @property
    def model_names(self) -> list[str]:
        return self.served_model_name or [self.model]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What was measured or read about model and machine before `resolve`; sizes in bytes."""

    dtype: str
    device: str
    max_positions: int
    kv_bytes_per_token: int
    free_bytes: int
    adapter_elements_per_row: int = 0  # A and B of one rank row, over all modules
    length_limit_reason: str = "the model's max_position_embeddings"


def resolve(config: EngineConfig, facts: ModelFacts) -> EngineConfig:
    """Turn every "auto" into a value, once, in an order in which each step has what it needs.

    Returns a new config; raises ConfigError with the field and the remedy.
    """
    length = _resolve_length(config, facts)
    on_gpu = facts.device.startswith("cuda")
    tokens = config.max_num_batched_tokens or (8192 if on_gpu else 512)
    lora = config.lora.verify_with_model_config(facts) if config.lora else None
    kv_bytes = config.kv_cache_memory_bytes or _default_kv_bytes(facts, on_gpu, lora)
    # No more than every sequence at full length could ever fill.
    most = (length + config.block_size) * config.max_num_seqs * facts.kv_bytes_per_token
    kv_bytes = min(kv_bytes, most)
    needed = (length + config.block_size) * facts.kv_bytes_per_token
    if kv_bytes < needed:
        length = _shrink_length(config, facts, kv_bytes)
    return config.model_copy(
        update={
            "dtype": facts.dtype,
            "device": facts.device,
            "max_model_len": length,
            "max_num_batched_tokens": tokens,
            "kv_cache_memory_bytes": kv_bytes,
            "async_scheduling": on_gpu
            if config.async_scheduling is None
            else config.async_scheduling,
            "lora": lora,
        }
    )


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


def _default_kv_bytes(facts: ModelFacts, on_gpu: bool, lora: LoRAConfig | None) -> int:
    if not on_gpu:
        return min(4 * GIB, facts.free_bytes // 4)
    pool = adapter_pool_bytes(lora, facts) if lora else 0
    # A tenth of what is left is for activations and logits, which nobody measures beforehand.
    return max(0, facts.free_bytes - pool) * 9 // 10


def adapter_pool_bytes(lora: LoRAConfig, facts: ModelFacts) -> int:
    """Bytes of the rank-row pool: `max_loras * max_lora_rank` rows of every module."""
    element = 4 if lora.lora_dtype == "float32" else 2
    return lora.max_loras * lora.max_lora_rank * facts.adapter_elements_per_row * element


def _shrink_length(config: EngineConfig, facts: ModelFacts, kv_bytes: int) -> int:
    """Fit an unset max_model_len to the KV budget; refuse one that the user asked for."""
    fits = kv_bytes // facts.kv_bytes_per_token - config.block_size
    if config.max_model_len is not None or fits < 1:
        need = ((config.max_model_len or 1) + config.block_size) * facts.kv_bytes_per_token
        raise ConfigError(
            f"the KV cache of {kv_bytes} bytes cannot hold one sequence of "
            f"{config.max_model_len or 1} tokens, which takes {need} bytes",
            field="kv_cache_memory_bytes",
            remedy="raise --kv-cache-memory-bytes or lower --max-model-len",
        )
    return fits
