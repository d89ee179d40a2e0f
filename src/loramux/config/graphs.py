"""Which decode steps are worth a CUDA graph, in integers: so that their memory can be planned."""

from __future__ import annotations

LARGEST = 512  # more sequences than this decode without a graph: their launches hide


def graph_sizes(most: int) -> list[int]:
    """Batch sizes worth a graph, up to `most` sequences: close together where steps are short."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, LARGEST + 1, 32)]
    most = min(most, LARGEST)
    return sorted({size for size in sizes if size < most} | {most})


def sizes_to_capture(chosen: list[int] | None, most: int) -> list[int]:
    """The `chosen` batch sizes, or those worth a graph; one that no step of up to `most` sequences
    fills serves the largest step."""
    if not chosen:
        return graph_sizes(most)
    return sorted({min(size, most) for size in chosen})


def active_buckets(max_loras: int) -> list[int]:
    """Powers of two up to `max_loras`, and `max_loras`."""
    return sorted(
        {1 << i for i in range(max_loras.bit_length()) if 1 << i < max_loras} | {max_loras}
    )


def row_buckets(rows: int) -> list[int]:
    """Doubling from 16 up to the whole pool of `rows` rows."""
    buckets = []
    size = 16
    while size < rows:
        buckets.append(size)
        size *= 2
    return [*buckets, rows]
