"""`write_kv` and `paged_attention` against float64, one query at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    DTYPES,
    NAN,
    STEP,
    assert_close,
    attention_oracle,
    fill_cache,
    int32,
    make_batch,
    poisoned,
    strided,
    with_images,
    without_notes,
)

from loramux.kernels import AttentionBatch
from loramux.kernels.dispatch import Backend

F32 = torch.float32
MIXED = [(1, 1), (1, 37), (3, 40), (0, 5), (15, 15), (2, 70), (17, 17), (18, 50)]


def check(
    ops: Backend,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: torch.dtype,
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
    tokens = batch.query_starts[-1]
    q = strided(tokens, heads[0], dims[0], dtype=dtype)
    scaling = dims[0] ** -0.5
    options = (scaling, window, softcap, sinks)
    out = ops.paged_attention(q, k_cache, v_cache, batch, *options)
    wanted = attention_oracle(q, k_cache, v_cache, batch, *options)
    assert out.dtype == dtype and out.shape == wanted.shape
    # Torch's SDPA, used for long chunks, rounds the softmax weights to the dtype as well.
    assert_close(out, wanted, steps=2.0, floor=max(2e-5, STEP[dtype]))


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 64), (256, 256), (20, 36)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_head_sizes(ops: Backend, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    check(ops, MIXED, (4, 2), dims, dtype)


@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (8, 1), (5, 5)], ids=str)
def test_grouped_heads(ops: Backend, heads: tuple[int, int]) -> None:
    check(ops, MIXED, heads, (32, 32), torch.float32)


@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 1, 6, 33, 1000])
def test_windows_and_softcaps(ops: Backend, window: int, softcap: float, block_size: int) -> None:
    dims = (32, 32)
    options = {"window": window, "softcap": softcap, "block_size": block_size}
    check(ops, MIXED, (4, 2), dims, torch.float32, **options)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 1, 6, 33, 1000])
def test_images_see_themselves_whole(ops: Backend, window: int, softcap: float) -> None:
    for _ in range(4):
        check(ops, MIXED, (4, 2), (32, 32), F32, window=window, softcap=softcap, images=True)
    check(ops, [(3, 1300), (20, 1000)], (2, 1), (32, 32), F32, window=window, images=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_beside_sinks_in_every_dtype(ops: Backend, dtype: torch.dtype) -> None:
    check(ops, MIXED, (4, 2), (32, 32), dtype, window=6, sinks=torch.randn(4), images=True)
    check(ops, MIXED, (4, 2), (20, 36), dtype, images=True)


def test_last_keys_end_with_the_context(ops: Backend) -> None:
    batch, blocks = make_batch([(3, 20), (18, 40)], 16)
    cache = fill_cache(batch, blocks, 16, 2, 32, F32)
    q = torch.randn(21, 4, 32)
    far, exact = (
        replace(batch, last_keys=int32(last)) for last in ([999] * 21, [19] * 3 + [39] * 18)
    )
    out = ops.paged_attention(q, cache, cache, far, 0.2)
    assert_close(out, attention_oracle(q, cache, cache, exact, 0.2, 0, 0.0), floor=2e-5)


def test_a_long_context_is_split_and_merged(ops: Backend) -> None:
    check(ops, [(1, 900), (2, 1500)], (2, 1), (64, 64), torch.float32)
    check(ops, [(3, 1300)], (2, 1), (64, 64), torch.float32, window=700)


def test_queries_of_a_long_chunk_are_cut(ops: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux.kernels.cpu_prefill.MASK_ELEMENTS", 1)
    for window in (0, 21):
        check(ops, [(40, 90), (50, 50)], (2, 1), (32, 32), F32, window=window, images=True)
    check(ops, [(40, 90), (50, 50)], (2, 1), (32, 32), torch.float32)
    check(ops, [(40, 90), (50, 50)], (2, 1), (32, 32), torch.float32, window=21)
    check(ops, [(40, 90), (50, 50)], (2, 1), (32, 32), torch.float32, sinks=torch.randn(2))


@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (8, 1), (5, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks(ops: Backend, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    for window in (0, 6, 33):
        check(ops, MIXED, heads, (32, 32), dtype, window=window, sinks=3 * torch.randn(heads[0]))


@pytest.mark.parametrize("dims", [(20, 36), (64, 64), (128, 64)], ids=str)
def test_sinks_beside_softcaps_and_other_value_sizes(ops: Backend, dims: tuple[int, int]) -> None:
    for softcap in (0.0, 3.0):
        check(ops, MIXED, (4, 2), dims, torch.float32, softcap=softcap, sinks=torch.randn(4))


def test_a_sink_counts_once_where_a_context_is_split(ops: Backend) -> None:
    for window in (0, 700):
        sinks = 4 + torch.randn(4)
        check(
            ops, [(1, 900), (2, 1500)], (4, 1), (64, 64), torch.float32, window=window, sinks=sinks
        )


@pytest.mark.parametrize("extreme", [30.0, 200.0, 3e38, -30.0, -200.0, -3e38, -float("inf")])
def test_sinks_of_any_size(ops: Backend, extreme: float) -> None:
    sinks = torch.tensor([extreme, 0.5, -1.0, extreme])
    for dtype in (torch.float32, torch.bfloat16):
        check(ops, MIXED, (4, 2), (32, 32), dtype, sinks=sinks)


def test_scores_of_any_size(ops: Backend) -> None:
    batch, blocks = make_batch([(1, 40)], 16)
    k_cache = fill_cache(batch, blocks, 16, 1, 32, torch.float32) * 1e4
    v_cache = fill_cache(batch, blocks, 16, 1, 32, torch.float32)
    q = torch.randn(1, 1, 32)
    out = ops.paged_attention(q, k_cache, v_cache, batch, 1.0)
    assert_close(out, attention_oracle(q, k_cache, v_cache, batch, 1.0, 0, 0.0))


def test_rows_of_nobody_are_zero_and_the_batch_can_be_used_again(ops: Backend) -> None:
    batch, blocks = make_batch([(1, 9), (18, 18)], 16)
    cache = fill_cache(batch, blocks, 16, 1, 16, torch.float32)
    q = torch.randn(22, 1, 16)
    first = ops.paged_attention(q, cache, cache, batch, 0.3)
    assert not first[19:].any() and first[:19].abs().min(-1).values.all()
    capped = ops.paged_attention(q, cache, cache, batch, 0.3, 0, 5.0)
    assert torch.equal(first, ops.paged_attention(q, cache, cache, batch, 0.3))
    assert torch.equal(
        capped, ops.paged_attention(q, cache, cache, without_notes(batch), 0.3, 0, 5.0)
    )


def test_the_cache_may_be_one_half_of_a_larger_tensor(ops: Backend) -> None:
    batch, blocks = make_batch([(1, 30), (4, 12)], 8)
    both = poisoned(blocks, 2, 8, 2, 16, dtype=torch.float32)
    k_cache, v_cache = both[:, 0], both[:, 1]
    k_cache.copy_(fill_cache(batch, blocks, 8, 2, 16, torch.float32))
    v_cache.copy_(fill_cache(batch, blocks, 8, 2, 16, torch.float32))
    q = torch.randn(5, 4, 16)
    out = ops.paged_attention(q, k_cache, v_cache, batch, 0.25)
    assert_close(out, attention_oracle(q, k_cache, v_cache, batch, 0.25, 0, 0.0), floor=1e-5)
    k = torch.randn(2, 2, 16)
    ops.write_kv(k, k * 2, k_cache, v_cache, torch.tensor([17, 3]))
    assert torch.equal(k_cache[2, 1], k[0]) and torch.equal(v_cache[0, 3], k[1] * 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_kv(ops: Backend, dtype: torch.dtype) -> None:
    merged = strided(6, 3 * 24 + 3 * 40, dtype=dtype)
    k = merged[:, :72].view(6, 3, 24)
    v = merged[:, 72:].view(6, 3, 40)
    k_cache, v_cache = poisoned(5, 4, 3, 24, dtype=dtype), poisoned(5, 4, 3, 40, dtype=dtype)
    slots = torch.tensor([7, 0, 19, 4, 5, 6])
    ops.write_kv(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache.flatten(0, 1)[slots], k)
    assert torch.equal(v_cache.flatten(0, 1)[slots], v)
    assert int(k_cache.isnan().sum()) == 14 * 72
    assert int(v_cache.isnan().sum()) == 14 * 120


def test_indices_that_point_outside_are_refused() -> None:
    cpu = pytest.importorskip("loramux.kernels.cpu")
    cache, k = torch.zeros(2, 4, 1, 8), torch.full((1, 1, 8), NAN)
    for slot in (-1, 8):
        with pytest.raises(ValueError, match="slot"):
            cpu.write_kv(k, k, cache, cache.clone(), torch.tensor([slot]))
    for block in (-1, 2):
        tables = torch.tensor([[block]], dtype=torch.int32)
        batch = AttentionBatch(tables, [0, 1], [3], int32([0, 1]), int32([3]))
        with pytest.raises(ValueError, match="block table"):
            cpu.paged_attention(k, cache, cache, batch, 1.0)
    batch = AttentionBatch(int32([0]).view(1, 1), [0, 1], [5], int32([0, 1]), int32([5]))
    with pytest.raises(ValueError, match="longer"):
        cpu.paged_attention(k, cache, cache, batch, 1.0)
    assert not cache.any()


@pytest.mark.parametrize(
    "sinks", [torch.zeros(3), torch.zeros(2).double(), torch.zeros(2, 1), torch.zeros(4)[::2]]
)
def test_sinks_of_another_form_are_refused(sinks: torch.Tensor) -> None:
    cpu = pytest.importorskip("loramux.kernels.cpu")
    batch, blocks = make_batch([(1, 9)], 16)
    cache = fill_cache(batch, blocks, 16, 1, 16, torch.float32)
    with pytest.raises(ValueError, match="sinks must be 2"):
        cpu.paged_attention(torch.randn(1, 2, 16), cache, cache, batch, 1.0, 0, 0.0, sinks)
