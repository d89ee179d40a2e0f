"""The memory budget before it is taken: what each part needs, and what that leaves for the KV cache.

    total * gpu_memory_utilization
    |-- weights --|-- adapter pool --|-- activations, workspaces, graphs --|-- KV cache: the rest --|

Only arithmetic. Activations are those of the largest step, tensor by tensor; what a captured graph
costs the driver is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loramux.config.facts import ModelFacts
from loramux.config.graphs import (
    GPU_STEP,
    REREAD_POSITIONS,
    active_buckets,
    affine_buckets,
    row_buckets,
    sizes_to_capture,
)
from loramux.config.lora import LoRAConfig

if TYPE_CHECKING:
    from loramux.config.engine import EngineConfig

MIB = 1 << 20
GIB = 1 << 30

SPARE_BYTES = 256 * MIB  # never planned: kernels that are first used later, and fragments
LIBRARY_BYTES = 64 * MIB  # cuBLAS keeps 32 MiB a stream that multiplies: the steps' and a side one
GRAPH_BYTES = 2 * MIB  # of the driver, for one captured step of some 300 launches
MOST_PRODUCT_ROWS = 1024  # pool rows in a base product; more are cheaper in a kernel of their own
ROW_STEP = 16  # the pool's rows come in these, see `layers/linear.py`
LOADER_STEP = 32 * MIB  # the staging memory of a load grows in these
MOST_CPU_KV_BYTES = 4 * GIB
MOST_ENCODED = 8192  # vectors of media that are made at once; more would take more memory


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes beside weights and KV cache."""

    pool: int
    activations: int
    workspace: int
    graphs: int
    encoder: int = 0  # vectors of media, and what it takes to make them

    @property
    def total(self) -> int:
        return self.pool + self.activations + self.workspace + self.graphs + self.encoder


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Who gets what, in bytes. `total_bytes` is 0 where there is no GPU."""

    device: str
    total_bytes: int
    utilization: float
    weight_bytes: int
    free_bytes: int  # beside the weights
    needs: Needs
    kv_bytes: int
    kv_bytes_per_token: int
    block_size: int
    max_model_len: int
    num_graphs: int
    max_loras: int  # 0: no adapters are served
    max_lora_rank: int
    num_ranks: int = 1  # each of which takes all of this
    vocabulary_bytes: int = 0  # of the adapter pool, for adapters' own vocabularies

    @property
    def num_blocks(self) -> int:
        return self.kv_bytes // (self.block_size * self.kv_bytes_per_token)

    @property
    def num_tokens(self) -> int:
        """Positions that the KV cache holds."""
        return self.num_blocks * self.block_size

    @property
    def full_sequences(self) -> float:
        """Sequences of `max_model_len` tokens that fit at once."""
        return self.num_tokens / self.max_model_len

    @property
    def left_bytes(self) -> int:
        """What stays free when all of it has been taken; below 0 when it cannot be."""
        return self.free_bytes - self.needs.total - self.kv_bytes

    def parts(self) -> dict[str, int]:
        """Part -> bytes, for metrics."""
        return {
            "weights": self.weight_bytes,
            "adapter_pool": self.needs.pool,
            "kv_cache": self.kv_bytes,
            "graphs": self.needs.graphs,
            "activations": self.needs.activations,
            "workspace": self.needs.workspace,
            "encoder": self.needs.encoder,
            "free": max(0, self.left_bytes),
        }


def plan_memory(config: EngineConfig, facts: ModelFacts) -> MemoryPlan:
    """The plan of a resolved config."""
    assert config.kv_cache_memory_bytes is not None and config.max_model_len is not None
    lora = config.lora
    return MemoryPlan(
        device=facts.device,
        total_bytes=facts.total_bytes,
        utilization=config.gpu_memory_utilization,
        weight_bytes=facts.weight_bytes,
        free_bytes=facts.free_bytes,
        needs=needs(config, facts),
        kv_bytes=config.kv_cache_memory_bytes,
        kv_bytes_per_token=facts.kv_bytes_per_token,
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        num_graphs=num_graphs(config, facts),
        max_loras=lora.max_loras if lora else 0,
        max_lora_rank=lora.max_lora_rank if lora else 0,
        num_ranks=config.tensor_parallel_size,
        vocabulary_bytes=vocabulary_bytes(lora, facts) if lora else 0,
    )


def needs(config: EngineConfig, facts: ModelFacts) -> Needs:
    """What a config whose length, tokens and LoRA are resolved takes beside weights and KV cache."""
    pool = adapter_pool_bytes(config.lora, facts) if config.lora else 0
    assert config.max_num_batched_tokens is not None
    tokens = max(config.max_num_batched_tokens, config.max_num_seqs)
    work = max(_layer_bytes(tokens, config.lora, facts), _sampling_bytes(config, facts))
    if not facts.on_gpu:
        return Needs(pool, work, 0, 0, _encoder_bytes(config, facts))
    return Needs(
        *(pool, work, _workspace_bytes(config, facts), _graph_bytes(config, facts)),
        _encoder_bytes(config, facts),
    )


def most_kv_bytes(config: EngineConfig, facts: ModelFacts) -> int:
    """The largest KV cache that can be had at all, whatever share was asked for."""
    spare = SPARE_BYTES if facts.on_gpu else 0
    taken = needs(config, facts).total if facts.on_gpu else 0
    return max(0, facts.free_bytes - taken - spare)


def default_kv_bytes(config: EngineConfig, facts: ModelFacts) -> int:
    """The KV cache where no size was asked for; 0 when there is no room for one."""
    if not facts.on_gpu:
        return min(MOST_CPU_KV_BYTES, facts.free_bytes // 4)
    budget = int(facts.total_bytes * config.gpu_memory_utilization)
    left = budget - facts.weight_bytes - needs(config, facts).total
    return max(0, min(left, most_kv_bytes(config, facts)))


def adapter_pool_bytes(lora: LoRAConfig, facts: ModelFacts) -> int:
    """Bytes of the rank-row pool, `max_loras * max_lora_rank` rows of every module with places for
    gains and shifts, and of the tables that adapters' own vocabularies take beside it."""
    rows = pool_rows(lora, facts.row_granule)
    places = -(-rows // place_rows(lora, facts.row_granule))
    elements = rows * facts.adapter_elements_per_row + 2 * places * facts.adapter_outputs
    return elements * _lora_itemsize(lora, facts) + vocabulary_bytes(lora, facts)


def vocabulary_bytes(lora: LoRAConfig, facts: ModelFacts) -> int:
    """Bytes of `layers/vocabulary.VocabularyPool`: rows of the embedding and of the head for each place,
    which token has which; and LoRA on both, a row for every token."""
    widths, rows = facts.widths, lora.max_lora_vocabulary_rows
    most = widths.vocab + rows
    taken = 0
    if rows:
        a_place = 2 * rows * widths.hidden * widths.itemsize + 4 * most + 8 * rows
        taken += lora.max_loras * a_place
    if lora.enable_vocabulary_lora:
        ranks = pool_rows(lora, facts.row_granule)
        taken += 2 * ranks * (most + widths.hidden) * _lora_itemsize(lora, facts)
    return taken


def pool_rows(lora: LoRAConfig, granule: int = 1) -> int:
    """Rank rows of the pool, of which an adapter takes a multiple of `granule`; so many ranks may share
    them, and each has a multiple of `ROW_STEP`."""
    rows = lora.max_loras * pool_rank(lora, granule)
    return rows + -rows % (ROW_STEP * granule)


def pool_rank(lora: LoRAConfig, granule: int = 1) -> int:
    """Rank rows of the pool that the largest adapter takes."""
    return lora.max_lora_rank + -lora.max_lora_rank % granule


def place_rows(lora: LoRAConfig, granule: int = 1) -> int:
    """Pool rows that share a place for gains and shifts: 16, or the next number that divides the rows of
    the largest adapter."""
    rows = pool_rank(lora, granule)
    return next(n for n in range(min(ROW_STEP, rows), rows + 1) if rows % n == 0)


def _encoder_bytes(config: EngineConfig, facts: ModelFacts) -> int:
    """Vectors that are kept, and those of the largest batch while they are made."""
    if (encoder := facts.encoder) is None or config.encoder_cache_tokens is None:
        return 0
    together = min(config.encoder_cache_tokens, MOST_ENCODED)
    # What a step takes out of the cache is copied once.
    kept = config.encoder_cache_tokens + (config.max_num_batched_tokens or 0)
    return kept * encoder.vector_bytes + together * encoder.work_bytes


def captured_sizes(config: EngineConfig) -> list[int]:
    """Tokens of the steps that are captured, where steps are."""
    tokens = max(config.max_num_batched_tokens or GPU_STEP, config.max_num_seqs)
    return sizes_to_capture(config.cudagraph_capture_sizes, config.max_num_seqs, tokens)


def num_graphs(config: EngineConfig, facts: ModelFacts) -> int:
    """Steps that are captured: see `GpuRunner`, whose keys these are."""
    if not facts.on_gpu or config.enforce_eager:
        return 0
    sizes = captured_sizes(config)
    if (lora := config.lora) is None:
        return len(sizes)
    under_weight, granule = lora.lora_dtype in ("auto", facts.dtype), facts.row_granule
    buckets = row_buckets(pool_rows(lora, granule), granule) if under_weight else []
    places = 1 + len(buckets)
    bounds = active_buckets(lora.max_loras) if lora.specialize_active_lora else []
    outer = int(lora.changes_vocabulary and facts.widths.fused)
    return sum(
        1
        + places * (1 + outer + sum(bound <= size for bound in bounds))
        + 1
        + len(affine_buckets(buckets, size, config.max_num_seqs))
        for size in sizes
    )


def _lora_itemsize(lora: LoRAConfig, facts: ModelFacts) -> int:
    dtype = facts.dtype if lora.lora_dtype == "auto" else lora.lora_dtype
    return 4 if dtype == "float32" else 2


def _layer_bytes(tokens: int, lora: LoRAConfig | None, facts: ModelFacts) -> int:
    """The tensors of one layer that are alive at once, at most: those of the MLP.

    Input and residual of the layer and of the MLP, the product of gate and up, and what of it goes
    down. A layer that is not fused keeps each about twice."""
    widths = facts.widths
    row = (4 * widths.hidden + widths.product + widths.inner) * widths.itemsize
    if not widths.fused:
        row *= 2
    row += widths.pairs * widths.routed * widths.itemsize
    if lora is not None:
        # Gate and up of each pool row, as float32 where a kernel of its own makes them.
        shrunk = 2 * min(pool_rows(lora, facts.row_granule), MOST_PRODUCT_ROWS) * 4
        row += max(1, widths.pairs) * shrunk
    return tokens * row


def _sampling_bytes(config: EngineConfig, facts: ModelFacts) -> int:
    """Logits of every sequence, and in float32 their adjusted copy and two temporaries of it."""
    lora, tokens, copies = config.lora, facts.widths.vocab, 1
    if lora is not None and lora.changes_vocabulary:  # a second, wider copy of the base model's
        tokens, copies = tokens + lora.max_lora_vocabulary_rows, 2
    return config.max_num_seqs * tokens * (copies * facts.widths.itemsize + 3 * 4)


def _workspace_bytes(config: EngineConfig, facts: ModelFacts) -> int:
    """What stands beside the steps: attention's and cuBLAS's workspaces, packed steps, staging."""
    staging = 0
    if config.lora is not None:
        # Of the largest adapter as it is in most files: in float32.
        adapter = config.lora.max_lora_rank * facts.adapter_elements_per_row * 4
        staging = -(-adapter // LOADER_STEP) * LOADER_STEP
    return (
        facts.attention_bytes
        + LIBRARY_BYTES
        + packed_bytes(config)
        + staging
        + _outer_bytes(config, facts)
    )


def _outer_bytes(config: EngineConfig, facts: ModelFacts) -> int:
    """What `engine/outer_steps.OuterSteps` keeps: embeddings and hidden states of a captured step."""
    if config.lora is None or not config.lora.changes_vocabulary:
        return 0
    largest = max(captured_sizes(config))
    rows = largest + max(largest, config.max_num_seqs)
    return rows * facts.widths.hidden * facts.widths.itemsize


def packed_bytes(config: EngineConfig) -> int:
    """At least what the buffers of a captured step and of others take on the device."""
    assert config.max_num_batched_tokens is not None and config.max_model_len is not None
    sequences = config.max_num_seqs
    tokens = max(config.max_num_batched_tokens, sequences)
    members = sequences * (config.lora.max_loras if config.lora else 1)
    pages = sequences * (-(-config.max_model_len // config.block_size) + 2)
    # A captured step has a sequence for each token, and room for those of prompts.
    captured = 21 * max(captured_sizes(config)) + 4 * members + pages
    captured += REREAD_POSITIONS // config.block_size
    mixed = 12 * tokens + 9 * sequences + 8 * members + pages
    return 4 * (captured + mixed) + MIB // 4  # fields start 16 bytes apart


def _graph_bytes(config: EngineConfig, facts: ModelFacts) -> int:
    """The driver's part, the activations that all graphs share, and their logits."""
    count = num_graphs(config, facts)
    if not count:
        return 0
    widths = facts.widths
    sizes = captured_sizes(config)
    largest = max(sizes)
    # Only the fused forward can leave its logits in one place for all.
    kept = [min(size, config.max_num_seqs) for size in sizes]
    rows = max(kept) if widths.fused else sum(kept) * count // len(kept)
    logits = rows * widths.vocab * widths.itemsize
    return count * GRAPH_BYTES + _layer_bytes(largest, config.lora, facts) + logits
