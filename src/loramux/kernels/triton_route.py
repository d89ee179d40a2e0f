"""Which rows the experts of a layer compute, and in chunks of which adapters, on a GPU.

Two kernels: the first finds each pair's place among all by counting those before it, the second
numbers the chunks that begin at the places so found. From some thousand pairs on torch sorts them,
between a kernel that says each pair's key and one that finds where the runs of a key begin and end.
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels import reference
from loramux.kernels.arguments import Routing, WorkList
from loramux.kernels.reference_experts import FEW_PAIRS, chunk_rows, compositions, most_chunks
from loramux.kernels.triton_launch import cdiv, launch, wait

PAIRS, TOKENS, CHUNKS = 32, 64, 64
"""Pairs that a program ranks, tokens whose pairs it compares them with at a time, and chunks of the
step that it looks these up in at a time."""

PLACES, MANY_PLACES = 256, 1024
"""Sorted rows in which a program numbers the chunks; the second, where there are thousands."""

ROWS = 128
"""Sorted rows whose runs a program looks up."""

LARGEST_KEY = 2**31 - 1


@triton.jit
def _compositions(tokens, chunks, counts, CHUNKS: tl.constexpr):
    """First member + 1 and end member of each of `tokens`, zeros for the base model."""
    first = tl.zeros(tokens.shape, tl.int32)
    stop = tl.zeros(tokens.shape, tl.int32)
    if chunks is not None:
        used = tl.load(counts + 1)
        for begin in range(tl.load(counts), used, CHUNKS):
            index = begin + tl.arange(0, CHUNKS)
            live = index < used
            at = chunks + index * 8
            low = tl.load(at, mask=live, other=0)[None, :]
            high = tl.load(at + 1, mask=live, other=0)[None, :]
            member = tl.load(at + 2, mask=live, other=0)
            end = tl.load(at + 3, mask=live, other=0)
            mine = (tokens[:, None] >= low) & (tokens[:, None] < high)
            mine = mine & (member < end)[None, :]  # [tokens, CHUNKS]
            first = tl.maximum(first, tl.max(tl.where(mine, (member + 1)[None, :], 0), 1))
            stop = tl.maximum(stop, tl.max(tl.where(mine, end[None, :], 0), 1))
    return first, stop


@triton.jit(do_not_specialize=["tokens", "experts", "radix"])
def _rank(
    chosen, token_stride, pair_stride, chunks, counts, order, places, ends, sorted_rows,
    tokens, experts, radix,
    K: tl.constexpr, CHUNK: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
    CHUNKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The place of `PAIRS` pairs, or how many pairs there are up to each of `PAIRS` experts.

    A pair's key is expert * radix + composition, and that of the bound of an expert the least that
    the next one could have. Of a sorted row `sorted_rows` [3, S] has the key, the end member, and
    the rows of the chunk that begins there, 0 if none does."""
    wait(EARLY)
    count = tokens * K
    pair_programs = (count + PAIRS - 1) // PAIRS
    is_pair = tl.program_id(0) < pair_programs
    own = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    live = own < count
    expert = (tl.program_id(0) - pair_programs) * PAIRS + tl.arange(0, PAIRS)
    if is_pair:
        at = chosen + (own // K).to(tl.int64) * token_stride + own % K * pair_stride
        expert = tl.load(at, mask=live, other=0).to(tl.int32)
        own_first, own_stop = _compositions(own // K, chunks, counts, CHUNKS)
        key = expert * radix + own_first
    else:
        own_stop = tl.zeros((PAIRS,), tl.int32)
        key = tl.minimum(expert + 1, experts) * radix
    smaller = tl.zeros((PAIRS, TOKENS), tl.int32)
    equal = tl.zeros((PAIRS, TOKENS), tl.int32)
    before = tl.zeros((PAIRS, TOKENS), tl.int32)  # of those that are equal
    for begin in range(0, tokens, TOKENS):
        token = begin + tl.arange(0, TOKENS)
        there = token < tokens
        first, _ = _compositions(token, chunks, counts, CHUNKS)
        for k in range(K):
            at = chosen + token.to(tl.int64) * token_stride + k * pair_stride
            other = tl.load(at, mask=there, other=0).to(tl.int32) * radix + first
            other = tl.where(there, other, 2147483647)[None, :]
            same = other == key[:, None]
            smaller += (other < key[:, None]).to(tl.int32)
            equal += same.to(tl.int32)
            before += (same & ((token * K + k)[None, :] < own[:, None])).to(tl.int32)
    less = tl.sum(smaller, 1)  # [PAIRS]
    if is_pair:
        ahead = tl.sum(before, 1)  # [PAIRS]
        left = tl.sum(equal, 1) - ahead  # [PAIRS]
        place = less + ahead
        tl.store(order + place, own, mask=live)
        tl.store(places + own, place, mask=live)
        if chunks is not None:
            rows = tl.where(ahead % CHUNK == 0, tl.minimum(left, CHUNK), 0)
            tl.store(sorted_rows + place, key, mask=live)
            tl.store(sorted_rows + count + place, own_stop, mask=live)
            tl.store(sorted_rows + 2 * count + place, rows, mask=live)
    else:
        tl.store(ends + expert, less, mask=expert < experts)


@triton.jit(do_not_specialize=["count", "most", "radix", "rows_per_expert"])
def _number(
    sorted_rows, member_rows, member_columns, member_scales, member_ranks, chunks, counts,
    row_chunks, count, most, radix, rows_per_expert, PLACES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The chunks that begin in `PLACES` of the sorted rows, and zeros behind the last chunk."""
    wait(EARLY)
    lengths = sorted_rows + 2 * count
    low = tl.program_id(0) * PLACES
    inside = tl.arange(0, PLACES)
    earlier = tl.zeros((PLACES,), tl.int32)
    total = tl.zeros((PLACES,), tl.int32)
    for begin in range(0, count, PLACES):
        one = tl.load(lengths + begin + inside, mask=begin + inside < count, other=0) > 0
        total += one.to(tl.int32)
        earlier += (one & (begin < low)).to(tl.int32)
    used = tl.sum(total, 0)
    rows = low + inside
    live = rows < count
    length = tl.load(lengths + rows, mask=live, other=0)
    key = tl.load(sorted_rows + rows, mask=live, other=0)
    stop = tl.load(sorted_rows + count + rows, mask=live, other=0)
    starting = length > 0
    index = tl.sum(earlier, 0) + tl.cumsum(starting.to(tl.int32), 0) - 1
    some = starting & (key % radix > 0)
    member = tl.where(some, key % radix - 1, 0)
    row = tl.load(member_rows + member, mask=some, other=0)
    column = tl.load(member_columns + member, mask=some, other=0)
    scale = tl.load(member_scales + member, mask=some, other=0.0).to(tl.int32, bitcast=True)
    rank = tl.load(member_ranks + member, mask=some, other=0)
    at = chunks + index * 8
    tl.store(at, rows, mask=starting)
    tl.store(at + 1, rows + length, mask=starting)
    tl.store(at + 2, member, mask=starting)
    tl.store(at + 3, stop, mask=starting)
    tl.store(at + 4, row + tl.where(some, key // radix * rows_per_expert, 0), mask=starting)
    tl.store(at + 5, column, mask=starting)
    tl.store(at + 6, scale, mask=starting)
    tl.store(at + 7, rank, mask=starting)
    tl.store(row_chunks + rows, index, mask=live)
    words = tl.arange(0, 8)[None, :]
    unused = (rows >= used) & (rows < most)
    nothing = tl.zeros((PLACES, 8), tl.int32)
    tl.store(chunks + rows[:, None] * 8 + words, nothing, mask=unused[:, None] & (words < 8))
    if tl.program_id(0) == 0:
        tl.store(counts, 0)
        tl.store(counts + 1, used)


@triton.jit(do_not_specialize=["tokens", "radix"])
def _keys(
    chosen, token_stride, pair_stride, chunks, counts, keys, stops, tokens, radix,
    K: tl.constexpr, TOKENS: tl.constexpr, CHUNKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The key of every pair of `TOKENS` tokens, see `_rank`, and the tokens' end members."""
    wait(EARLY)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < tokens
    first, stop = _compositions(token, chunks, counts, CHUNKS)
    tl.store(stops + token, stop, mask=there)
    for k in range(K):
        at = chosen + token.to(tl.int64) * token_stride + k * pair_stride
        expert = tl.load(at, mask=there, other=0).to(tl.int32)
        tl.store(keys + token * K + k, expert * radix + first, mask=there)


@triton.jit
def _count_below(keys, count, bound, live, STEPS: tl.constexpr):
    """How many of the sorted `keys` are below `bound`, each."""
    low = tl.zeros(bound.shape, tl.int32)
    high = low + count
    for _ in range(STEPS):
        middle = (low + high) // 2
        open_ = live & (low < high)
        below = tl.load(keys + middle, mask=open_, other=2147483647) < bound
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & (below == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["count", "experts", "radix"])
def _runs(
    keys, sorted_pairs, stops, order, places, ends, sorted_rows, count, experts, radix,
    K: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Of `ROWS` sorted rows what `_rank` says of them, or of so many experts their ends."""
    row_programs = (count + ROWS - 1) // ROWS
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < count
    if tl.program_id(0) < row_programs:
        pair = tl.load(sorted_pairs + rows, mask=live, other=0).to(tl.int32)
        tl.store(order + rows, pair, mask=live)
        tl.store(places + pair, rows, mask=live)
        if sorted_rows is not None:
            key = tl.load(keys + rows, mask=live, other=0)
            begin = _count_below(keys, count, key, live, STEPS)
            end = _count_below(keys, count, key + 1, live, STEPS)
            length = tl.where((rows - begin) % CHUNK == 0, tl.minimum(end - rows, CHUNK), 0)
            stop = tl.load(stops + pair // K, mask=live, other=0)
            tl.store(sorted_rows + rows, key, mask=live)
            tl.store(sorted_rows + count + rows, stop, mask=live)
            tl.store(sorted_rows + 2 * count + rows, length, mask=live)
    else:
        expert = (tl.program_id(0) - row_programs) * ROWS + tl.arange(0, ROWS)
        inside = expert < experts
        bound = tl.minimum(expert + 1, experts) * radix
        tl.store(ends + expert, _count_below(keys, count, bound, inside, STEPS), mask=inside)


class _Places(NamedTuple):
    """What is found of every pair, and of the sorted rows as `_rank` says."""

    order: torch.Tensor  # [S]
    places: torch.Tensor  # [S]
    ends: torch.Tensor  # [E]
    sorted_rows: torch.Tensor | None  # [3, S]


def _sorted(chosen: torch.Tensor, work: WorkList | None, radix: int, found: _Places) -> None:
    """Fill `found` by sorting."""
    tokens, top_k = chosen.shape
    count, device = tokens * top_k, chosen.device
    keys = torch.empty(count, dtype=torch.int32, device=device)  # [S]
    stops = torch.empty(tokens, dtype=torch.int32, device=device)  # [T]
    lists = (None, None) if work is None else (work.chunks, work.counts)
    launch(
        _keys,
        (cdiv(tokens, TOKENS),),
        (chosen, *chosen.stride(), *lists, keys, stops, tokens, radix),
        K=top_k,
        TOKENS=TOKENS,
        CHUNKS=CHUNKS,
        num_warps=4,
    )
    keys, pairs = keys.sort(stable=True)  # [S], [S]
    experts = found.ends.shape[0]
    launch(
        _runs,
        (cdiv(count, ROWS) + cdiv(experts, ROWS),),
        (keys, pairs, stops, *found, count, experts, radix),
        K=top_k,
        CHUNK=chunk_rows(count),
        ROWS=ROWS,
        STEPS=count.bit_length() + 1,
        num_warps=4,
    )


def _counted(chosen: torch.Tensor, work: WorkList | None, radix: int, found: _Places) -> None:
    """Fill `found` by counting."""
    tokens, top_k = chosen.shape
    count, experts = tokens * top_k, found.ends.shape[0]
    lists = (None, None) if work is None else (work.chunks, work.counts)
    launch(
        _rank,
        (cdiv(count, PAIRS) + cdiv(experts, PAIRS),),
        (chosen, *chosen.stride(), *lists, *found, tokens, experts, radix),
        K=top_k,
        CHUNK=chunk_rows(count),
        PAIRS=PAIRS,
        TOKENS=TOKENS,
        CHUNKS=CHUNKS,
        num_warps=4,
    )


def route(
    chosen: torch.Tensor, num_experts: int, work: WorkList | None, rows_per_expert: int
) -> Routing:
    """The pairs of `chosen` [T, K] by expert, composition and number, and their chunks."""
    tokens, top_k = chosen.shape
    count, device = tokens * top_k, chosen.device
    radix = 1 if work is None else compositions(work)
    if (num_experts + 1) * radix > LARGEST_KEY:
        return reference.route(chosen, num_experts, work, rows_per_expert)
    order, places = torch.empty((2, count), dtype=torch.int32, device=device)  # [S], [S]
    ends = torch.empty(num_experts, dtype=torch.int32, device=device)  # [E]
    sorted_rows = None
    if work is not None:
        sorted_rows = torch.empty((3, count), dtype=torch.int32, device=device)  # [3, S]
    found = _Places(order, places, ends, sorted_rows)
    (_counted if count <= FEW_PAIRS else _sorted)(chosen, work, radix, found)
    if work is None or sorted_rows is None:
        return Routing(order, places, ends, None)
    most = most_chunks(count, num_experts, work)
    chunks = torch.empty((most, 8), dtype=torch.int32, device=device)  # [C, 8]
    counts = torch.empty(2, dtype=torch.int32, device=device)  # [2]
    row_chunks = torch.empty(count, dtype=torch.int32, device=device)  # [S]
    step = PLACES if count <= FEW_PAIRS else MANY_PLACES
    lists = (work.member_rows, work.member_columns, work.member_scales, work.member_ranks)
    launch(
        _number,
        (cdiv(count, step),),
        (sorted_rows, *lists, chunks, counts, row_chunks, count, most, radix, rows_per_expert),
        PLACES=step,
        num_warps=4,
    )
    sorted_work = replace(
        *(work,),
        **{"chunks": chunks, "counts": counts, "row_chunks": row_chunks},
        **{"rows_per_chunk": chunk_rows(count), "max_chunks": most},
    )
    return Routing(order, places, ends, sorted_work)
