"""What to lower, and by how much, when the memory does not suffice. Pure arithmetic and words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from loramux.config.facts import ModelFacts
from loramux.config.memory import (
    MIB,
    SPARE_BYTES,
    adapter_pool_bytes,
    needs,
    vocabulary_bytes,
)
from loramux.config.sizes import format_size
from loramux.errors import ConfigError

if TYPE_CHECKING:
    from loramux.config.engine import EngineConfig

Part = Literal["pool", "kv_cache", "workspace", "graphs", "activations"]
"""What is taken at start after the weights, in this order."""

NAMES: dict[Part, str] = {
    "pool": "the adapter pool",
    "kv_cache": "the KV cache",
    "workspace": "the workspaces of attention and steps",
    "graphs": "the CUDA graphs of small steps",
    "activations": "the largest step",
}
LEAST_STEP = 256 * MIB  # lower by less, and the next start may fail at the next allocation


def weights_do_not_fit(device: str, need: int, free: int) -> ConfigError:
    """The weights alone are more than is free: no budget of ours helps."""
    short = format_size(max(need - free, LEAST_STEP))
    return ConfigError(
        f"the weights take {format_size(need)} and {format_size(free)} of {device}'s memory are free",
        field="model",
        remedy=f"free about {short} of it (other processes?), give a 16-bit --dtype, a smaller "
        "model, or another --device",
    )


def out_of_memory(
    part: Part, need: int, free: int, config: EngineConfig, facts: ModelFacts
) -> ConfigError:
    """`part` could not be taken: it needs about `need` bytes where `free` were free before it.

    `config` is resolved. The error names the budgets that help, each with a value."""
    short = max(need - free, LEAST_STEP)
    own = {
        "pool": _smaller_pool,
        "kv_cache": _nothing,
        "workspace": _fewer_tokens,
        "graphs": _fewer_graphs,
        "activations": _fewer_tokens,
    }[part](config, facts, short)
    ways = [*own, *([] if part == "pool" else [_smaller_kv(config, facts, short)])]
    return ConfigError(
        f"{facts.device} ran out of memory at start, with {NAMES[part]}: about {format_size(need)} "
        f"are needed there, and {format_size(free)} were free",
        field=ways[0][0],
        remedy="; or ".join(text for _, text in ways),
    )


def kv_too_large(config: EngineConfig, facts: ModelFacts, most: int) -> ConfigError:
    """`kv_cache_memory_bytes` is more than can be had."""
    asked = config.kv_cache_memory_bytes or 0
    beside = ""
    if facts.on_gpu:
        taken = needs(config, facts).total + SPARE_BYTES
        beside = f" of which {format_size(taken)} are for adapters, activations and graphs,"
    return ConfigError(
        f"a KV cache of {format_size(asked)} does not fit: {format_size(facts.free_bytes)} are free"
        f" beside the weights,{beside} so at most {format_size(most)} can be had",
        field="kv_cache_memory_bytes",
        remedy=f"lower --kv-cache-memory to {most} or less" if most else _others(config),
    )


def no_room_for_kv(config: EngineConfig, facts: ModelFacts) -> ConfigError:
    """Nothing is left for the KV cache."""
    taken = needs(config, facts)
    if not facts.on_gpu:
        return ConfigError("no memory is free for the KV cache", field="kv_cache_memory_bytes")
    budget = int(facts.total_bytes * config.gpu_memory_utilization)
    used = facts.weight_bytes + taken.total
    reasons = []
    remedy = _others(config)
    if used >= budget:
        encoder = f", encoder ({format_size(taken.encoder)})" if taken.encoder else ""
        reasons.append(
            f"weights ({format_size(facts.weight_bytes)}), adapter pool ({format_size(taken.pool)}), "
            f"activations ({format_size(taken.activations)}), workspaces "
            f"({format_size(taken.workspace)}){encoder} and graphs ({format_size(taken.graphs)}) fill "
            f"gpu_memory_utilization {config.gpu_memory_utilization:g} of "
            f"{format_size(facts.total_bytes)}"
        )
    if taken.total + SPARE_BYTES < facts.free_bytes:
        remedy = f"raise --gpu-memory-utilization, or {remedy}"
    else:
        reasons.append(
            f"only {format_size(facts.free_bytes)} of the GPU are free beside the weights, and "
            f"{format_size(taken.total + SPARE_BYTES)} are needed for the rest"
        )
    return ConfigError(
        f"no memory is left for the KV cache: {'; '.join(reasons)}",
        field="gpu_memory_utilization",
        remedy=remedy,
    )


Way = tuple[str, str]
"""A field, and what to do with it."""


def _others(config: EngineConfig) -> str:
    lora = "--max-loras or --max-lora-rank, " if config.lora else ""
    media = "--encoder-cache-tokens, " if config.encoder_cache_tokens else ""
    return f"lower {lora}{media}--max-num-batched-tokens or --max-num-seqs"


def _smaller_pool(config: EngineConfig, facts: ModelFacts, short: int) -> list[Way]:
    lora = config.lora
    assert lora is not None, "there is no pool without LoRA"
    pool = adapter_pool_bytes(lora, facts)
    share = max(0.0, 1 - short / pool) if pool else 0.0
    ways = []
    for name in ("max_loras", "max_lora_rank"):
        fewer = int(getattr(lora, name) * share)
        if fewer:
            flag = "--" + name.replace("_", "-")
            ways.append((name, f"lower {flag} to {fewer} (about {format_size(short)} less)"))
    own, rows = vocabulary_bytes(lora, facts), lora.max_lora_vocabulary_rows
    if fewer := int(rows * (1 - short / own)) if own > short else 0:
        ways.append(
            ("max_lora_vocabulary_rows", f"lower --max-lora-vocabulary-rows to {fewer}"),
        )
    text = f"give --dtype or --lora-dtype of 16 bits, or free about {format_size(short)}"
    return ways or [("max_loras", f"not even one adapter fits: lower --max-lora-rank, {text}")]


def _fewer_tokens(config: EngineConfig, facts: ModelFacts, short: int) -> list[Way]:
    """Steps of so many fewer tokens, whose activations are in proportion."""
    tokens = config.max_num_batched_tokens or 0
    work = needs(config, facts).activations
    fewer = int(tokens * (1 - short / work)) // config.block_size * config.block_size if work else 0
    # Prompts longer than a step are cut, so any number serves; few tokens serve slowly.
    fewer = max(fewer, min(tokens // 2, 512))
    if fewer < 1:
        return []
    return [("max_num_batched_tokens", f"lower --max-num-batched-tokens to {fewer}")]


def _fewer_graphs(config: EngineConfig, facts: ModelFacts, short: int) -> list[Way]:
    return [
        (
            "cudagraph_capture_sizes",
            "capture fewer steps (--cudagraph-capture-sizes 1 8 32) or none (--enforce-eager)",
        )
    ]


def _nothing(config: EngineConfig, facts: ModelFacts, short: int) -> list[Way]:
    return []


def _smaller_kv(config: EngineConfig, facts: ModelFacts, short: int) -> Way:
    """A smaller KV cache, in the words of the setting that made it."""
    kv_bytes = max(0, (config.kv_cache_memory_bytes or 0) - short)
    by_size = f"lower --kv-cache-memory to {kv_bytes} (about {format_size(short)} less)"
    if not facts.total_bytes:
        return ("kv_cache_memory_bytes", by_size)
    wanted = facts.weight_bytes + needs(config, facts).total + kv_bytes
    percent = math.floor(100 * wanted / facts.total_bytes)
    if not 0 < percent < 100 * config.gpu_memory_utilization:
        return ("kv_cache_memory_bytes", by_size)
    by_share = f"lower --gpu-memory-utilization to {percent / 100:.2f}"
    return ("gpu_memory_utilization", f"{by_share}; or {by_size}")
