"""The memory budget in integers: who is paid first, what is left, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from loramux.config import EngineConfig, LoRAConfig, ModelFacts, plan_memory, resolve
from loramux.config.facts import EncoderFacts, Widths
from loramux.config.graphs import active_buckets, graph_sizes, row_buckets, sizes_to_capture
from loramux.config.memory import (
    SPARE_BYTES,
    adapter_pool_bytes,
    num_graphs,
    packed_bytes,
    pool_rows,
)
from loramux.config.memory_advice import out_of_memory, weights_do_not_fit
from loramux.engine.graphs import graph_keys
from loramux.engine.memory_table import summary
from loramux.engine.packing import Capacity, PackedStep, capacities
from loramux.errors import ConfigError
from loramux.layers.vocabulary import VocabularyPool, VocabularyShape

GIB = 1 << 30
H200_BYTES = 150_110_011_392
# Llama-3.1-8B in bf16, and cos and sin of its 131,072 positions.
LLAMA_BYTES = 16_060_522_496 + 131_072 * 128 * 2
CONTEXT_BYTES = 600 << 20  # what the driver keeps for itself
LLAMA = ModelFacts(
    dtype="bfloat16",
    device="cuda",
    max_positions=131_072,
    kv_bytes_per_token=32 * 2 * 8 * 128 * 2,
    free_bytes=H200_BYTES - LLAMA_BYTES - CONTEXT_BYTES,
    adapter_elements_per_row=2_621_440,
    total_bytes=H200_BYTES,
    weight_bytes=LLAMA_BYTES,
    attention_bytes=136 << 20,
    widths=Widths(hidden=4096, product=28672, inner=14336, vocab=128_256),
)
VLLM_TOKENS = 839_648  # vLLM 0.26, the same model and share, measured: 102.5 GiB


def _config(**settings: Any) -> EngineConfig:
    return EngineConfig(model="m", **settings)


def test_at_least_as_much_kv_as_vllm() -> None:
    plan = plan_memory(resolve(_config(gpu_memory_utilization=0.85), LLAMA), LLAMA)
    assert plan.num_tokens >= VLLM_TOKENS
    assert round(plan.kv_bytes / GIB, 1) >= 102.5
    budget = int(H200_BYTES * 0.85)
    assert LLAMA_BYTES + plan.needs.total + plan.kv_bytes <= budget
    # It is not had by leaving out what a step takes: 8192 rows of gate, up and their product.
    assert plan.needs.activations >= 8192 * (28672 + 14336) * 2
    assert plan.needs.workspace > LLAMA.attention_bytes
    assert plan.needs.graphs > 256 * 128_256 * 2


@pytest.mark.parametrize("share", [0.3, 0.85, 0.95, 1.0])
@pytest.mark.parametrize("others", [0, 5, 60, 100])
@pytest.mark.parametrize("loras", [0, 8, 64])
def test_never_more_than_is_free(share: float, others: int, loras: int) -> None:
    facts = replace(LLAMA, free_bytes=LLAMA.free_bytes - others * GIB)
    lora = LoRAConfig(max_loras=loras) if loras else None
    config = resolve(_config(gpu_memory_utilization=share, lora=lora), facts)
    plan = plan_memory(config, facts)
    assert plan.kv_bytes > 0
    assert plan.left_bytes >= SPARE_BYTES
    assert sum(plan.parts().values()) == facts.weight_bytes + facts.free_bytes
    assert plan.num_blocks * 16 * facts.kv_bytes_per_token <= plan.kv_bytes


def test_the_adapter_pool_is_paid_first() -> None:
    plans = [
        plan_memory(resolve(_config(lora=LoRAConfig(max_loras=n)), LLAMA), LLAMA)
        for n in (1, 8, 64, 256)
    ]
    for few, many in pairwise(plans):
        more = many.needs.pool - few.needs.pool
        assert more == (many.max_loras - few.max_loras) * 16 * 2_621_440 * 2
        assert few.kv_bytes - many.kv_bytes >= more
    wide = LoRAConfig(max_loras=8, lora_dtype="float32")
    assert adapter_pool_bytes(wide, LLAMA) == 2 * plans[1].needs.pool
    # Rows come in sixteens, so that every product keeps aligned rows.
    odd = LoRAConfig(max_loras=1, max_lora_rank=17)
    assert adapter_pool_bytes(odd, LLAMA) == 2 * plans[0].needs.pool


def test_more_tokens_in_a_step_leave_less_kv() -> None:
    sizes = [
        resolve(_config(max_num_batched_tokens=n), LLAMA).kv_cache_memory_bytes or 0
        for n in (1024, 8192, 32768)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] - sizes[2] >= (32768 - 8192) * (28672 + 14336) * 2


def test_graphs_are_counted_as_they_are_captured() -> None:
    def count(**settings: Any) -> int:
        return num_graphs(resolve(_config(**settings), LLAMA), LLAMA)

    assert count() == 27  # 1, 2, 4, 8 of up to 64, 12 of up to 256; 4 more for prompts
    assert count(enforce_eager=True) == 0
    assert count(cudagraph_capture_sizes=[1, 8]) == 2
    assert sizes_to_capture([16, 1, 8, 32], 2, 9) == [1, 8, 9]
    assert sizes_to_capture(None, 9, 300) == graph_sizes(9, 300)
    assert graph_sizes(9, 300) == [1, 2, 4, 8, 9, 16, 32, 64, 128, 256]
    assert graph_sizes(1000, 8192)[-4:] == [480, 512, 768, 1024]
    assert graph_sizes(1, 4) == [1]
    # None, and with adapters in a kernel of their own or 16 rows in the product; both again for DoRA.
    assert count(cudagraph_capture_sizes=[1, 8], lora=LoRAConfig()) == 2 * 5
    float32 = LoRAConfig(lora_dtype="float32")
    assert count(cudagraph_capture_sizes=[1, 8], lora=float32) == 2 * 3
    # Steps with prompts, and pools of more than 128 rows, take no rows along there.
    assert count(cudagraph_capture_sizes=[512], lora=LoRAConfig()) == 4
    large = LoRAConfig(max_loras=32)
    assert count(cudagraph_capture_sizes=[8], lora=large) == 1 + (1 + 6) + (1 + 1)
    active = LoRAConfig(max_loras=4, specialize_active_lora=True)
    # Pools of 16, 32 and 64 rows or none; up to any number, 1, 2 and 4 adapters.
    expected = (1 + 4 * 2 + 2) + (1 + 4 * 4 + 2)
    assert count(cudagraph_capture_sizes=[1, 8], lora=active) == expected


@pytest.mark.parametrize("loras", [1, 8])
@pytest.mark.parametrize(("sequences", "tokens", "length"), [(4, 64, 100), (300, 64, 33)])
def test_packed_steps_are_no_larger_than_planned(
    loras: int, sequences: int, tokens: int, length: int
) -> None:
    config = _config(
        max_num_seqs=sequences,
        max_num_batched_tokens=tokens,
        max_model_len=length,
        lora=LoRAConfig(max_loras=loras),
    )
    pages, members = sequences * (-(-length // 16) + 2), sequences * loras
    steps = [
        PackedStep(Capacity(n, sequences, members, pages), torch.device("cpu"))
        for n in (sequences, max(tokens, sequences))
    ]
    assert sum(step.device.nbytes for step in steps) <= packed_bytes(config)


@pytest.mark.parametrize("lora, ranks", [(None, 0), (LoRAConfig(max_lora_rank=64), 64)])
def test_steps_know_the_largest_rank(lora: LoRAConfig | None, ranks: int) -> None:
    config = _config(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=100, lora=lora)
    for capacity in capacities(config, 4, 16)[1:]:
        step = PackedStep(capacity, torch.device("cpu"))
        assert step.work(1, 8, affine=False).max_ranks == ranks


def test_a_cpu_keeps_its_share() -> None:
    for free, kv_bytes in ((8 * GIB, 2 * GIB), (64 * GIB, 4 * GIB)):
        facts = replace(LLAMA, device="cpu", total_bytes=0, free_bytes=free)
        plan = plan_memory(resolve(_config(), facts), facts)
        assert (plan.kv_bytes, plan.needs.graphs, plan.num_graphs) == (kv_bytes, 0, 0)


def test_a_size_that_was_asked_for_is_taken_whatever_the_share() -> None:
    config = resolve(_config(kv_cache_memory="115GiB", gpu_memory_utilization=0.1), LLAMA)
    assert config.kv_cache_memory_bytes == 115 * GIB


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_kv_than_is_free_is_refused(device: str) -> None:
    facts = replace(LLAMA, device=device)
    with pytest.raises(ConfigError, match=r"200\.0 GiB does not fit") as refused:
        resolve(_config(kv_cache_memory="200GiB"), facts)
    assert refused.value.field == "kv_cache_memory_bytes"
    most = int(str(refused.value.remedy).split()[3])
    assert resolve(_config(kv_cache_memory=most), facts).kv_cache_memory_bytes == most
    with pytest.raises(ConfigError, match="does not fit"):
        resolve(_config(kv_cache_memory=most + 1), facts)


def test_vectors_of_media_are_in_the_budget() -> None:
    facts = replace(LLAMA, encoder=EncoderFacts(vector_bytes=8192, work_bytes=60_000))
    settings: dict[str, Any] = {"max_num_batched_tokens": 4096, "encoder_cache_tokens": 20_000}
    config = resolve(_config(**settings), facts)
    plan, without = plan_memory(config, facts), plan_memory(resolve(_config(), LLAMA), LLAMA)
    assert plan.needs.encoder == (20_000 + 4096) * 8192 + 8192 * 60_000
    assert plan.parts()["encoder"] == plan.needs.encoder and not without.needs.encoder
    assert resolve(_config(max_num_batched_tokens=100), facts).encoder_cache_tokens == 400
    with pytest.raises(ConfigError, match="encoder_cache_tokens is set, and the model takes text"):
        resolve(_config(encoder_cache_tokens=5), LLAMA)
    huge = replace(facts, encoder=EncoderFacts(vector_bytes=1 << 24, work_bytes=0))
    with pytest.raises(ConfigError) as caught:
        resolve(_config(), huge)
    assert "encoder (" in str(caught.value) and "--encoder-cache-tokens" in str(caught.value)


def test_no_room_is_refused_with_every_reason() -> None:
    with pytest.raises(ConfigError, match=r"fill gpu_memory_utilization 0\.1 ") as refused:
        resolve(_config(gpu_memory_utilization=0.1), LLAMA)
    assert "raise --gpu-memory-utilization" in str(refused.value)
    full = replace(LLAMA, free_bytes=GIB)
    with pytest.raises(ConfigError, match=r"only 1\.0 GiB") as refused:
        resolve(_config(lora=LoRAConfig(max_loras=8)), full)
    assert "--max-loras" in str(refused.value) and "raise" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"fill .*; only 1\.0 GiB"):
        resolve(_config(gpu_memory_utilization=0.1), full)


def test_out_of_memory_names_the_budget_and_a_value_that_helps() -> None:
    lora = LoRAConfig(max_loras=64)
    config = resolve(_config(lora=lora), LLAMA)
    need = plan_memory(config, LLAMA).needs.pool

    pool = out_of_memory("pool", need, need - GIB, config, LLAMA)
    assert pool.field == "max_loras"
    assert "lower --max-loras to 51 " in str(pool) and "--max-lora-rank to 12 " in str(pool)
    assert "adapter pool: about 5.0 GiB are needed there, and 4.0 GiB were free" in str(pool)

    kv_bytes = config.kv_cache_memory_bytes or 0
    kv = out_of_memory("kv_cache", kv_bytes, kv_bytes - 3 * GIB, config, LLAMA)
    assert kv.field == "gpu_memory_utilization"
    share = float(str(kv).split("--gpu-memory-utilization to ")[1].split(";")[0])
    size = int(str(kv).split("--kv-cache-memory to ")[1].split()[0])
    assert size == kv_bytes - 3 * GIB
    again = resolve(_config(lora=lora, gpu_memory_utilization=share), LLAMA)
    assert size - H200_BYTES // 100 <= (again.kv_cache_memory_bytes or 0) <= size

    step = out_of_memory("activations", 2 * GIB, GIB, config, LLAMA)
    assert step.field == "max_num_batched_tokens"
    assert "--max-num-batched-tokens to 512" in str(step) and "--kv-cache-memory to" in str(step)

    graphs = out_of_memory("graphs", GIB, 0, config, LLAMA)
    assert graphs.field == "cudagraph_capture_sizes" and "--enforce-eager" in str(graphs)


def test_out_of_memory_of_a_size_asked_for_names_that_size() -> None:
    config = resolve(_config(kv_cache_memory="100GiB", gpu_memory_utilization=0.5), LLAMA)
    error = out_of_memory("kv_cache", 100 * GIB, 99 * GIB, config, LLAMA)
    assert error.field == "kv_cache_memory_bytes"
    assert f"--kv-cache-memory to {99 * GIB}" in str(error)
    assert "utilization" not in str(error)


def test_one_adapter_that_does_not_fit() -> None:
    config = resolve(_config(lora=LoRAConfig(max_loras=1, max_lora_rank=1)), LLAMA)
    error = out_of_memory("pool", 80 << 20, 0, config, LLAMA)
    assert "not even one adapter" in str(error)


def test_weights_that_do_not_fit() -> None:
    error = weights_do_not_fit("cuda", 16 * GIB, 10 * GIB)
    assert "16.0 GiB and 10.0 GiB" in str(error) and "about 6.0 GiB" in str(error)


@pytest.mark.parametrize(("rows", "low_rank"), [(0, True), (100, False), (3000, True)])
def test_vocabularies_of_adapters_are_planned_as_they_are_taken(rows: int, low_rank: bool) -> None:
    lora = LoRAConfig(
        max_loras=3,
        max_lora_rank=16,
        max_lora_vocabulary_rows=rows,
        enable_vocabulary_lora=low_rank,
    )
    config = resolve(_config(lora=lora), LLAMA)
    shape = VocabularyShape(
        *(LLAMA.widths.vocab, LLAMA.widths.hidden, 3, rows, pool_rows(lora) if low_rank else 0)
    )
    pool = VocabularyPool(shape, torch.bfloat16, torch.bfloat16, torch.device("meta"))
    tables = [value for value in vars(pool).values() if isinstance(value, torch.Tensor)]
    taken = sum(table.numel() * table.element_size() for table in tables)
    plain = plan_memory(resolve(_config(lora=LoRAConfig(max_loras=3)), LLAMA), LLAMA)
    plan = plan_memory(config, LLAMA)
    assert plan.vocabulary_bytes == plan.needs.pool - plain.needs.pool == taken > 0
    assert "of it for their vocabularies" in summary(plan)
    assert plain.vocabulary_bytes == 0 and "vocabularies" not in summary(plain)
    assert plan.num_graphs > plain.num_graphs


def test_bodies_are_counted_as_they_are_captured() -> None:
    sizes = [1, 8]
    for lora in (
        LoRAConfig(max_lora_vocabulary_rows=1),
        LoRAConfig(max_loras=4, specialize_active_lora=True, enable_vocabulary_lora=True),
    ):
        config = resolve(_config(cudagraph_capture_sizes=sizes, lora=lora), LLAMA)
        bounds = active_buckets(lora.max_loras) if lora.specialize_active_lora else []
        places = [0, *row_buckets(pool_rows(lora))]
        most = config.max_num_seqs
        keys = graph_keys(sizes, places, bounds, sequences=most, outer=True)
        assert len(set(keys)) == num_graphs(config, LLAMA)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("max_loras, max_lora_rank", [(1, 1), (3, 7), (5, 16), (8, 64)])
def test_ranks_that_share_rows_have_whole_steps_of_them(
    ranks: int, max_loras: int, max_lora_rank: int
) -> None:
    """Products over a rank's part stay aligned, and their graphs are counted."""
    lora = LoRAConfig(max_loras=max_loras, max_lora_rank=max_lora_rank, fully_sharded_loras=True)
    rows = pool_rows(lora, ranks)
    buckets = row_buckets(rows, ranks)
    assert rows >= max_loras * -(-max_lora_rank // ranks) * ranks
    assert buckets[-1] == rows and all(bucket % (16 * ranks) == 0 for bucket in buckets)
    config = resolve(_config(cudagraph_capture_sizes=[1, 8], lora=lora), LLAMA)
    most, facts = config.max_num_seqs, replace(LLAMA, row_granule=ranks)
    keys = graph_keys([1, 8], [0, *buckets], [], sequences=most, outer=False)
    assert len(set(keys)) == num_graphs(config, facts)


def test_fewer_rows_of_vocabularies_are_advised() -> None:
    lora = LoRAConfig(max_loras=8, max_lora_vocabulary_rows=128_256)
    config = resolve(_config(lora=lora), LLAMA)
    need = plan_memory(config, LLAMA).needs.pool
    error = out_of_memory("pool", need, need - 2 * GIB, config, LLAMA)
    assert error.remedy is not None
    fewer = int(error.remedy.partition("--max-lora-vocabulary-rows to ")[2].split(";")[0])
    smaller = LoRAConfig(max_loras=8, max_lora_vocabulary_rows=fewer)
    saved = need - plan_memory(resolve(_config(lora=smaller), LLAMA), LLAMA).needs.pool
    assert 2 * GIB * 0.98 < saved < 2 * GIB * 1.1
