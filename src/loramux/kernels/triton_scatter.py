"""An adapter's bytes on the device -> rank rows of the pool, all sites and slices in one launch.

    bytes as in the file         A [r, in]    ──── rows ─────>   a[s, p:p+r]
                                 B [out, r]   ─ transposed ──>   b[p:p+r, columns of s]
                                                                 row_r, row_scale [s, p:p+max_r]

A table with one line a slice says where everything is; `ScatterTable` writes it. Rows outside
p..p+max_r-1 are never touched, nor within them what the adapter leaves alone.
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels.arguments import LoRASite

TILE_ROWS, TILE_FEATURES = 16, 256

# Columns of the table, int64. What differs from load to load comes first. Addresses are in bytes,
# strides in elements, data types by their place in DTYPES, the scale by its float32 bits.
COLUMNS = 16
SOURCE_A, DTYPE_A, SOURCE_B, DTYPE_B, RANK, SCALE = (tl.constexpr(i) for i in range(6))
CHANGING = 6
MAX_RANK = tl.constexpr(6)
IN, OUT = tl.constexpr(7), tl.constexpr(8)
TARGET_A, STRIDE_A = tl.constexpr(9), tl.constexpr(10)
TARGET_B, STRIDE_B = tl.constexpr(11), tl.constexpr(12)
TARGET_R, TARGET_SCALE = tl.constexpr(13), tl.constexpr(14)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True, slots=True)
class SliceSource:
    """Both factors of one slice as they stand in the buffer: A [r, in] and B [out, r]."""

    a_offset: int
    a_dtype: torch.dtype
    b_offset: int
    b_dtype: torch.dtype
    r: int
    scale: float


Sources = Mapping[tuple[int, int], SliceSource]
"""(site, slice) -> source; slices that are not named are left alone by the adapter."""


class ScatterTable:
    """The table of one pool. The sites' tensors must stay where they are."""

    def __init__(self, sites: Sequence[LoRASite]):
        dtypes = {site.a.dtype for site in sites}
        assert len(dtypes) == 1, "the sites of a pool share one data type"
        self.dtype = dtypes.pop()
        self._lines: dict[tuple[int, int], int] = {}
        lines: list[list[int]] = []
        moves: list[list[int]] = []
        self._tiles: list[int] = []
        for index, site in enumerate(sites):
            for slice_index in range(site.num_slices):
                self._lines[index, slice_index] = len(lines)
                lines.append(_line(site, slice_index))
                moves.append(_bytes_per_row(site))
                self._tiles.append(_tiles(lines[-1]))
        self._base = torch.tensor(lines, dtype=torch.int64)  # [E, COLUMNS]
        self._per_row = torch.tensor(moves, dtype=torch.int64)  # [E, COLUMNS]

    @property
    def num_bytes(self) -> int:
        return self._base.nbytes

    def fill(self, sources: Sources, buffer_address: int, first_row: int, max_r: int) -> Scatter:
        """The work of one load whose bytes begin at `buffer_address`."""
        table = self._base + self._per_row * first_row  # [E, COLUMNS]
        table[:, MAX_RANK.value] = max_r
        changing = [
            [
                buffer_address + source.a_offset,
                DTYPES.index(source.a_dtype),
                buffer_address + source.b_offset,
                DTYPES.index(source.b_dtype),
                source.r,
                struct.unpack("<i", struct.pack("<f", source.scale))[0],
            ]
            for source in sources.values()
        ]
        lines = [self._lines[key] for key in sources]
        if changing:
            table[lines, :CHANGING] = torch.tensor(changing, dtype=torch.int64)  # [M, CHANGING]
        tiles = max((self._tiles[line] for line in lines), default=1)
        return Scatter(table, tiles, self.dtype)


@dataclass(frozen=True, slots=True)
class Scatter:
    """One launch: the table [E, COLUMNS] int64 (on the host), and how much a line needs at most."""

    table: torch.Tensor
    tiles: int
    dtype: torch.dtype


def _line(site: LoRASite, index: int) -> list[int]:
    """What is fixed of a slice, for first row 0."""
    start, end = site.slice_starts[index], site.slice_starts[index + 1]
    line = [0] * COLUMNS
    line[IN.value], line[OUT.value] = site.a.shape[2], end - start
    line[TARGET_A.value], line[STRIDE_A.value] = site.a[index].data_ptr(), site.a.stride(1)
    line[TARGET_B.value], line[STRIDE_B.value] = site.b[:, start:].data_ptr(), site.b.stride(0)
    line[TARGET_R.value] = site.row_r[index].data_ptr()
    line[TARGET_SCALE.value] = site.row_scale[index].data_ptr()
    return line


def _tiles(line: list[int]) -> int:
    """Programs that one line needs."""
    return sum(-(-line[side.value] // TILE_FEATURES) for side in (IN, OUT))


def _bytes_per_row(site: LoRASite) -> list[int]:
    """How far the addresses of a line move with each row of the pool."""
    line = [0] * COLUMNS
    line[TARGET_A.value] = site.a.stride(1) * site.a.element_size()
    line[TARGET_B.value] = site.b.stride(0) * site.b.element_size()
    line[TARGET_R.value] = site.row_r.element_size()
    line[TARGET_SCALE.value] = site.row_scale.element_size()
    return line


def scatter(work: Scatter, table: torch.Tensor) -> None:
    """Launch on the current stream; `table` is the work's table where the kernel can read it."""
    _scatter[(work.tiles, table.shape[0])](
        table, POOL=NAMES[work.dtype], ROWS=TILE_ROWS, FEATURES=TILE_FEATURES, WIDTH=COLUMNS
    )


@triton.jit
def _read(address, code, offsets, here):
    """Elements of the type that `code` names, as float32."""
    if code == 0:
        values = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=here, other=0.0)
    elif code == 1:
        half = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=here, other=0.0)
        values = half.to(tl.float32)
    else:
        brain = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=here, other=0.0)
        values = brain.to(tl.float32)
    return values


@triton.jit
def _write_notes(line, rank, ROWS: tl.constexpr):
    """row_r and row_scale: the first row has them, the adapter's other rows have 0."""
    scale = tl.load(line + SCALE).to(tl.int32).to(tl.float32, bitcast=True)
    target_r = tl.load(line + TARGET_R).to(tl.pointer_type(tl.int32))
    target_scale = tl.load(line + TARGET_SCALE).to(tl.pointer_type(tl.float32))
    max_rank = tl.load(line + MAX_RANK)
    for start in range(0, max_rank, ROWS):
        rows = start + tl.arange(0, ROWS)
        first = rows == 0
        tl.store(target_r + rows, tl.where(first, rank.to(tl.int32), 0), mask=rows < max_rank)
        tl.store(target_scale + rows, tl.where(first, scale, 0.0), mask=rows < max_rank)


@triton.jit
def _scatter(
    table, POOL: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr
):
    tile = tl.program_id(0)
    line = table + tl.program_id(1).to(tl.int64) * WIDTH
    rank = tl.load(line + RANK)
    in_features, out_features = tl.load(line + IN), tl.load(line + OUT)
    if tile == 0:
        _write_notes(line, rank, ROWS)
    tiles_a = tl.cdiv(in_features, FEATURES)
    rows = tl.arange(0, ROWS)  # of the adapter, [ROWS]
    if tile < tiles_a:
        source, code = tl.load(line + SOURCE_A), tl.load(line + DTYPE_A)
        target = tl.load(line + TARGET_A).to(tl.pointer_type(POOL))
        stride = tl.load(line + STRIDE_A)
        columns = tile.to(tl.int64) * FEATURES + tl.arange(0, FEATURES)  # [FEATURES]
        for start in range(0, rank, ROWS):
            row = (start + rows).to(tl.int64)[:, None]
            here = (row < rank) & (columns < in_features)[None, :]
            values = _read(source, code, row * in_features + columns[None, :], here)
            tl.store(target + row * stride + columns[None, :], values.to(POOL), mask=here)
    else:
        source, code = tl.load(line + SOURCE_B), tl.load(line + DTYPE_B)
        target = tl.load(line + TARGET_B).to(tl.pointer_type(POOL))
        stride = tl.load(line + STRIDE_B)
        columns = (tile - tiles_a) * FEATURES + tl.arange(0, FEATURES)  # [FEATURES]
        for start in range(0, rank, ROWS):
            row = (start + rows).to(tl.int64)
            # Read as it lies, features down; turned in registers; written as it will lie.
            there = (columns < out_features)[:, None] & (row < rank)[None, :]
            values = _read(source, code, columns[:, None] * rank + row[None, :], there)
            here = (row < rank)[:, None] & (columns < out_features)[None, :]
            targets = target + row[:, None] * stride + columns[None, :]
            tl.store(targets, tl.trans(values.to(POOL)), mask=here)


def scatter_reference(
    sites: Sequence[LoRASite], buffer: torch.Tensor, sources: Sources, first_row: int, max_r: int
) -> None:
    """What `scatter` does, in torch. `buffer` [bytes] uint8 lies where the sites lie."""
    for index, site in enumerate(sites):
        for slice_index in range(site.num_slices):
            site.row_r[slice_index, first_row : first_row + max_r] = 0
            site.row_scale[slice_index, first_row : first_row + max_r] = 0
            source = sources.get((index, slice_index))
            if source is None:
                continue
            start, end = site.slice_starts[slice_index], site.slice_starts[slice_index + 1]
            rows = slice(first_row, first_row + source.r)
            a = _matrix(buffer, source.a_offset, source.a_dtype, source.r, site.a.shape[2])
            b = _matrix(buffer, source.b_offset, source.b_dtype, end - start, source.r)
            site.a[slice_index, rows] = a.to(site.a.dtype)  # [r, in]
            site.b[rows, start:end] = b.t().to(site.b.dtype)  # [r, out]
            site.row_r[slice_index, first_row] = source.r
            site.row_scale[slice_index, first_row] = source.scale


def _matrix(
    buffer: torch.Tensor, offset: int, dtype: torch.dtype, rows: int, columns: int
) -> torch.Tensor:
    flat = buffer[offset : offset + rows * columns * dtype.itemsize]  # [bytes]
    return flat.view(dtype).view(rows, columns)  # [rows, columns]
