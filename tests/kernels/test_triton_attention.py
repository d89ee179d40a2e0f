"""The Triton `paged_attention` against the float64 oracle, on the GPU or in the interpreter.

Caches hold NaN wherever no sequence has a position, block tables -1 where nobody may follow."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    DTYPES,
    STEP,
    assert_close,
    attention_oracle,
    fill_cache,
    make_batch,
    strided,
    with_images,
)

from loramux.kernels import AttentionBatch, reference

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from loramux.kernels import cuda_attention, triton_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16 = torch.float32, torch.bfloat16
DECODE = [(1, 1), (1, 16), (1, 70)]
MIXED = [(1, 37), (0, 5), (15, 15), (3, 40), (18, 90)]


def on_device(batch: AttentionBatch) -> AttentionBatch:
    return replace(
        batch,
        block_tables=batch.block_tables.to(DEVICE),
        query_starts_tensor=batch.query_starts_tensor.to(DEVICE),
        context_lens_tensor=batch.context_lens_tensor.to(DEVICE),
        last_keys=None if batch.last_keys is None else batch.last_keys.to(DEVICE),
    )


def run(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    *options: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    q, k_cache, v_cache = (t.to(DEVICE) for t in (q, k_cache, v_cache))
    scaling, window, softcap = (*options, 0, 0.0)[:3]
    batch = on_device(batch)
    sinks = None if sinks is None else sinks.to(DEVICE)
    result = triton_attention.paged_attention(
        q, k_cache, v_cache, batch, scaling, int(window), softcap, sinks
    )
    return result.cpu()


def check(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = F32,
    *,
    window: int = 0,
    softcap: float = 0.0,
    block_size: int = 16,
    sinks: torch.Tensor | None = None,
    images: bool = False,
) -> None:
    """Blocks that a window has left behind are gone from the table and hold NaN."""
    firsts = [max(0, context - q + 1 - window) if window else 0 for q, context in lengths]
    batch, blocks = make_batch(lengths, block_size, firsts)
    if images:
        batch = with_images(batch)
    k_cache = fill_cache(batch, blocks, block_size, heads[1], dims[0], dtype)
    v_cache = fill_cache(batch, blocks, block_size, heads[1], dims[1], dtype)
    for i, first in enumerate(firsts):  # the part of a block that the window has left, too
        for position in range(first // block_size * block_size, first):
            block = batch.block_tables[i, position // block_size]
            for cache in (k_cache, v_cache):
                cache[block, position % block_size] = torch.nan
    q = strided(batch.query_starts[-1], heads[0], dims[0], dtype=dtype)
    scaling = dims[0] ** -0.5
    out = run(q, k_cache, v_cache, batch, scaling, window, softcap, sinks=sinks)
    wanted = attention_oracle(q, k_cache, v_cache, batch, scaling, window, softcap, sinks)
    assert out.dtype == dtype and out.is_contiguous()
    # The weights of the values are rounded to the dtype as well.
    assert_close(out, wanted, steps=2.0, floor=max(2e-5, STEP[dtype]))


@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (96, 96), (128, 128), (20, 36)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_head_sizes(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    check(DECODE, (4, 1), dims, dtype)
    check(MIXED, (4, 2), dims, dtype)


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (9, 3), (8, 2), (8, 1), (17, 1)], ids=str)
def test_grouped_heads(heads: tuple[int, int]) -> None:
    check(DECODE, heads)
    check(MIXED, heads)


@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 1, 6, 33, 1000])
def test_windows_and_softcaps(window: int, softcap: float, block_size: int) -> None:
    check(MIXED, window=window, softcap=softcap, block_size=block_size)


@pytest.mark.parametrize("heads", [(1, 1), (8, 2)], ids=str)
@pytest.mark.parametrize("window", [0, 1, 6, 33])
def test_images_see_themselves_whole(window: int, heads: tuple[int, int]) -> None:
    for dtype in DTYPES:
        check([(4, 4), *MIXED, (1, 9)], heads, dtype=dtype, window=window, images=True)
    check([(90, 120), (1, 30)], heads, window=window, images=True)
    check(MIXED, heads, window=window, softcap=3.0, sinks=torch.randn(heads[0]), images=True)


def test_last_keys_end_with_the_context() -> None:
    batch, blocks = make_batch([(3, 20), (18, 40)], 16)
    cache = fill_cache(batch, blocks, 16, 1, 16, F32)
    q = torch.randn(21, 2, 16)
    far, exact = (
        replace(batch, last_keys=torch.tensor(last, dtype=torch.int32))
        for last in ([999] * 21, [19] * 3 + [39] * 18)
    )
    assert_close(
        run(q, cache, cache, far, 0.25), attention_oracle(q, cache, cache, exact, 0.25, 0, 0.0)
    )


def test_a_plan_of_causal_attention_is_not_taken_for_images() -> None:
    class Planner:
        def covers(self, kind: object) -> bool:
            return True

    batch, blocks = make_batch([(3, 20)], 16)
    cache, q = fill_cache(batch, blocks, 16, 1, 16, F32), torch.randn(3, 2, 16)
    planned = replace(with_images(batch), notes={cuda_attention.PLANNER: Planner()})
    with pytest.raises(AssertionError, match="last_keys has no plan"):
        cuda_attention.paged_attention(q, cache, cache, planned, 0.25)
    unplanned = on_device(replace(planned, notes={}))
    arguments = [t.to(DEVICE) for t in (q, cache, cache)]
    out = cuda_attention.paged_attention(*arguments, unplanned, 0.25)
    assert_close(out.cpu(), attention_oracle(q, cache, cache, planned, 0.25, 0, 0.0))


@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (8, 2), (17, 1)], ids=str)
@pytest.mark.parametrize("window", [0, 6, 33])
def test_sinks(window: int, heads: tuple[int, int]) -> None:
    for lengths in (DECODE, MIXED):
        check(lengths, heads, window=window, sinks=3 * torch.randn(heads[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks_beside_softcaps_and_other_value_sizes(dtype: torch.dtype) -> None:
    for softcap in (0.0, 3.0):
        check(MIXED, (4, 2), (20, 36), dtype, softcap=softcap, sinks=torch.randn(4))


@pytest.mark.filterwarnings("ignore:overflow")  # to infinity, which is meant
@pytest.mark.parametrize("extreme", [30.0, 200.0, 3e38, -30.0, -200.0, -3e38, -float("inf")])
def test_sinks_of_any_size(extreme: float) -> None:
    sinks = torch.tensor([extreme, 0.5, -1.0, extreme])
    for lengths in (DECODE, MIXED):
        check(lengths, dtype=BF16, sinks=sinks)
        check(lengths, sinks=sinks)


def test_many_tiles_and_row_blocks() -> None:
    check([(1, 700), (70, 300)], (4, 1))
    check([(1, 700), (70, 300)], (4, 1), dtype=BF16, window=100)
    check([(1, 700), (70, 300)], (4, 1), sinks=4 + torch.randn(4))


def test_chunks_continue_a_prompt() -> None:
    """Three chunks of one prompt give the rows of the whole one."""
    batch, blocks = make_batch([(50, 50)], 16)
    cache = fill_cache(batch, blocks, 16, 1, 16, F32)
    q = torch.randn(50, 2, 16)
    parts = []
    for start, end in ((0, 7), (7, 40), (40, 50)):
        starts, contexts = torch.tensor([0, end - start]), torch.tensor([end])
        chunk = AttentionBatch(
            batch.block_tables, [0, end - start], [end], starts.int(), contexts.int()
        )
        parts.append(run(q[start:end], cache, cache, chunk, 0.25))
    assert_close(torch.cat(parts), attention_oracle(q, cache, cache, batch, 0.25, 0, 0.0))


def test_large_scores() -> None:
    batch, blocks = make_batch([(1, 40), (3, 80)], 16)
    k_cache = fill_cache(batch, blocks, 16, 1, 16, F32) * 1e4
    v_cache = fill_cache(batch, blocks, 16, 1, 16, F32)
    q = torch.randn(4, 1, 16)
    for softcap in (0.0, 50.0):
        out = run(q, k_cache, v_cache, batch, 1.0, 0, softcap)
        assert_close(out, attention_oracle(q, k_cache, v_cache, batch, 1.0, 0, softcap), floor=1e-5)


def test_rows_of_nobody_and_of_padding_are_zero() -> None:
    """A captured graph has more sequences and rows than a step fills: lengths are the device's."""
    batch, blocks = make_batch([(1, 9), (1, 18)], 16)
    cache = fill_cache(batch, blocks, 16, 1, 16, F32)
    q = torch.randn(6, 2, 16)
    wanted = reference.paged_attention(q.double(), cache.double(), cache.double(), batch, 0.3)
    padded = AttentionBatch(
        torch.nn.functional.pad(batch.block_tables, (0, 0, 0, 2), value=-1),
        [0, 1, 2, 3, 3],
        [9, 18, 0, 0],
        torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32),
        torch.tensor([9, 18, 0, 0], dtype=torch.int32),
        max_queries=1,
    )
    out = run(q, cache, cache, padded, 0.3)
    assert_close(out, wanted)
    assert not out[2:].any()
    lists_of_the_capture = replace(padded, query_starts=[], context_lens=[])
    assert torch.equal(out, run(q, cache, cache, lists_of_the_capture, 0.3))
    assert not run(q, cache, cache, padded, 0.3, sinks=torch.randn(2))[2:].any()


def test_a_step_without_rows() -> None:
    batch, blocks = make_batch([(0, 5)], 16)
    cache = fill_cache(batch, blocks, 16, 1, 16, F32)
    assert run(torch.zeros(0, 2, 16), cache, cache, batch, 0.3).shape == (0, 2, 16)


def test_the_cache_may_be_one_half_of_a_larger_tensor() -> None:
    batch, blocks = make_batch([(1, 30), (4, 12)], 8)
    both = torch.full((blocks, 2, 8, 2, 16), torch.nan)
    both[:, 0] = fill_cache(batch, blocks, 8, 2, 16, F32)
    both[:, 1] = fill_cache(batch, blocks, 8, 2, 16, F32)
    q = torch.randn(5, 4, 16)
    out = run(q, both[:, 0], both[:, 1], batch, 0.25)
    wanted = attention_oracle(q, both[:, 0], both[:, 1], batch, 0.25, 0, 0.0)
    assert_close(out, wanted, floor=1e-5)
