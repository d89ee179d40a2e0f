"""Which steps are worth a CUDA graph, in integers: so that their memory can be planned."""

from __future__ import annotations

from collections.abc import Sequence

LARGEST = 1024  # tokens; launching the kernels of larger steps hides behind their work
LARGEST_DECODE = 512  # sequences that decode together, with a size close to every number of them
GPU_STEP = 8192  # tokens of the largest step on a GPU, if nothing else is asked for
REREAD_POSITIONS = 1 << 19  # see `engine/singles.py`
REREAD_BYTES = 40 << 30  # out of the L2 cache mostly; 12 ms at 3.5 TB/s
MOST_AFFINE_ROWS = 128
PROMPT_SIZES = (16, 32, 64, 128, 256, 384, 512, 768, LARGEST)


def graph_sizes(sequences: int, tokens: int) -> list[int]:
    """Tokens of steps worth a graph, of up to `tokens` tokens: close together where a step can be one
    token of each of up to `sequences` sequences, far apart where prompts are in it."""
    most = min(sequences, tokens, LARGEST_DECODE)
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, most, 32)]
    decode = {size for size in sizes if size < most} | {most}
    return sorted(decode | {size for size in PROMPT_SIZES if most < size <= tokens})


def sizes_to_capture(chosen: list[int] | None, sequences: int, tokens: int) -> list[int]:
    """The `chosen` sizes, or those worth a graph; one that no step of up to `tokens` tokens fills
    serves the largest step."""
    if not chosen:
        return graph_sizes(sequences, tokens)
    return sorted({min(size, tokens) for size in chosen})


def active_buckets(max_loras: int) -> list[int]:
    """Powers of two up to `max_loras`, and `max_loras`."""
    return sorted(
        {1 << i for i in range(max_loras.bit_length()) if 1 << i < max_loras} | {max_loras}
    )


def affine_buckets(buckets: Sequence[int], tokens: int, sequences: int) -> list[int]:
    """Of `buckets` those for steps of `tokens` tokens in which adapters have gains and shifts: few,
    since each is a graph more. At most one, and none where the step is more than a token of each of up
    to `sequences` sequences."""
    small = [rows for rows in buckets if rows <= MOST_AFFINE_ROWS]
    return small[-1:] if tokens <= sequences else []


def row_buckets(rows: int, granule: int = 1) -> list[int]:
    """Doubling from 16, on each of `granule` ranks that share them, up to the whole pool of `rows`."""
    buckets = []
    size = 16 * granule
    while size < rows:
        buckets.append(size)
        size *= 2
    return [*buckets, rows]
