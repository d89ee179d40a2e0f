"""An adapter's bytes on the device -> rank rows of the pool, all sites and slices in one launch.

    bytes as in the file         A [r, in]    ──── rows ─────>   a[s, p:p+r]
                                 B [out, r]   ─ transposed ──>   b[p:p+r, columns of s]
                                                                 row_r, row_scale [s, p:p+max_r]

A table with one line a slice, and of experts one for each, says where everything is; `ScatterTable`
writes it. Rows outside p..p+max_r-1 are never touched, nor within them what the adapter leaves alone.
"""

# The bodies of Triton functions are not Python that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from loramux.kernels.arguments import LoRASite

Array = np.ndarray[Any, np.dtype[Any]]
TILE_ROWS, TILE_FEATURES = 16, 256

# Columns of the table, int64. What differs from load to load comes first. Addresses are in bytes,
# strides in elements, data types by their place in DTYPES, the scale by its float32 bits.
COLUMNS = 20
SOURCE_A, DTYPE_A, SOURCE_B, DTYPE_B, RANK, SCALE = (tl.constexpr(i) for i in range(6))
ROW_A, COLUMN_A, ROW_B, COLUMN_B, HALF_B = (tl.constexpr(i) for i in range(6, 11))
CHANGING = 11
MAX_RANK = tl.constexpr(11)
IN, OUT = tl.constexpr(12), tl.constexpr(13)
TARGET_A, STRIDE_A = tl.constexpr(14), tl.constexpr(15)
TARGET_B, STRIDE_B = tl.constexpr(16), tl.constexpr(17)
TARGET_R, TARGET_SCALE = tl.constexpr(18), tl.constexpr(19)

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

    def lines(self, features: int) -> Array:
        """What the table says of it, offsets for addresses: [1, CHANGING] int64."""
        scale = struct.unpack("<i", struct.pack("<f", self.scale))[0]
        types = DTYPES.index(self.a_dtype), DTYPES.index(self.b_dtype)
        places = (self.a_offset, types[0], self.b_offset, types[1])
        return np.array([(*places, self.r, scale, features, 1, self.r, 1, 0)], np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertSource:
    """Both factors of one slice for each of E experts; all arrays are [E] int64 but `scales`, float32.

    Expert e's A [r, in] begins at `a_offsets[e]` bytes, with strides of `a_strides` elements between
    rows and between columns; B [out, r] likewise. Where r[e] is 0 the rest means nothing. With
    `alternating` B's rows are those of two halves in turn, which the pool has one after the other."""

    a_offsets: Array
    a_strides: tuple[Array, Array]
    a_dtype: torch.dtype
    b_offsets: Array
    b_strides: tuple[Array, Array]
    b_dtype: torch.dtype
    r: Array
    scales: Array
    out_features: int
    alternating: bool = False

    def lines(self, features: int) -> Array:
        """As `SliceSource.lines`, for each expert: [E, CHANGING]."""
        lines = np.empty((len(self.r), CHANGING), np.int64)
        lines[:, SOURCE_A.value], lines[:, SOURCE_B.value] = self.a_offsets, self.b_offsets
        lines[:, DTYPE_A.value] = DTYPES.index(self.a_dtype)
        lines[:, DTYPE_B.value] = DTYPES.index(self.b_dtype)
        lines[:, RANK.value] = self.r
        lines[:, SCALE.value] = self.scales.astype(np.float32).view(np.int32)
        lines[:, ROW_A.value], lines[:, COLUMN_A.value] = self.a_strides
        lines[:, ROW_B.value], lines[:, COLUMN_B.value] = self.b_strides
        lines[:, HALF_B.value] = self.out_features // 2 if self.alternating else 0
        return lines


Sources = Mapping[tuple[int, int], SliceSource | ExpertSource]
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
        self._features: dict[tuple[int, int], int] = {}
        for index, site in enumerate(sites):
            for slice_index in range(site.num_slices):
                self._lines[index, slice_index] = len(lines)
                self._features[index, slice_index] = site.a.shape[2]
                first, move = _line(site, slice_index), _bytes_per_row(site)
                rows = site.row_r.shape[1] // site.experts
                for expert in range(site.experts):
                    pairs = zip(first, move, strict=True)
                    lines.append([value + step * expert * rows for value, step in pairs])
                    moves.append(move)
                    self._tiles.append(_tiles(first))
        self._base = torch.tensor(lines, dtype=torch.int64)  # [E, COLUMNS]
        self._per_row = torch.tensor(moves, dtype=torch.int64)  # [E, COLUMNS]

    @property
    def num_bytes(self) -> int:
        return self._base.nbytes

    def fill(self, sources: Sources, buffer_address: int, first_row: int, max_r: int) -> Scatter:
        """The work of one load whose bytes begin at `buffer_address`."""
        table = self._base + self._per_row * first_row  # [E, COLUMNS]
        table[:, MAX_RANK.value] = max_r
        parts = [source.lines(self._features[key]) for key, source in sources.items()]
        firsts = [self._lines[key] for key in sources]
        if parts:
            changing = np.concatenate(parts)  # [M, CHANGING]
            changing[:, [SOURCE_A.value, SOURCE_B.value]] += buffer_address
            runs = [np.arange(f, f + len(p)) for f, p in zip(firsts, parts, strict=True)]
            table.numpy()[np.concatenate(runs), :CHANGING] = changing
        tiles = max((self._tiles[first] for first in firsts), default=1)
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
            offsets = row * tl.load(line + ROW_A) + columns[None, :] * tl.load(line + COLUMN_A)
            values = _read(source, code, offsets, here)
            tl.store(target + row * stride + columns[None, :], values.to(POOL), mask=here)
    else:
        source, code = tl.load(line + SOURCE_B), tl.load(line + DTYPE_B)
        target = tl.load(line + TARGET_B).to(tl.pointer_type(POOL))
        stride = tl.load(line + STRIDE_B)
        columns = (tile - tiles_a) * FEATURES + tl.arange(0, FEATURES)  # [FEATURES]
        half = tl.load(line + HALF_B)
        lying = columns
        if half > 0:
            lying = columns % half * 2 + columns // half
        for start in range(0, rank, ROWS):
            row = (start + rows).to(tl.int64)
            # Read as it lies, features down; turned in registers; written as it will lie.
            there = (columns < out_features)[:, None] & (row < rank)[None, :]
            offsets = lying[:, None] * tl.load(line + ROW_B) + row[None, :] * tl.load(
                line + COLUMN_B
            )
            values = _read(source, code, offsets, there)
            here = (row < rank)[:, None] & (columns < out_features)[None, :]
            targets = target + row[:, None] * stride + columns[None, :]
            tl.store(targets, tl.trans(values.to(POOL)), mask=here)


def scatter_reference(
    sites: Sequence[LoRASite], buffer: torch.Tensor, sources: Sources, first_row: int, max_r: int
) -> None:
    """What `scatter` does, in torch. `buffer` [bytes] uint8 lies where the sites lie."""
    for index, site in enumerate(sites):
        for slice_index in range(site.num_slices):
            source = sources.get((index, slice_index))
            lines = None if source is None else source.lines(site.a.shape[2])
            for expert in range(site.experts):
                first = expert * (site.row_r.shape[1] // site.experts) + first_row
                site.row_r[slice_index, first : first + max_r] = 0
                site.row_scale[slice_index, first : first + max_r] = 0
                if lines is not None:
                    _scatter_line(site, slice_index, first, buffer, lines[expert].tolist())


def _scatter_line(
    site: LoRASite, index: int, first: int, buffer: torch.Tensor, line: list[int]
) -> None:
    r = line[RANK.value]
    if r == 0:
        return
    start, end = site.slice_starts[index], site.slice_starts[index + 1]
    a = _strided(buffer, line, (SOURCE_A, DTYPE_A, ROW_A, COLUMN_A), r, site.a.shape[2])
    b = _strided(buffer, line, (SOURCE_B, DTYPE_B, ROW_B, COLUMN_B), end - start, r)
    if line[HALF_B.value]:
        b = torch.cat((b[0::2], b[1::2]))  # [out, r]
    site.a[index, first : first + r] = a.to(site.a.dtype)  # [r, in]
    site.b[first : first + r, start:end] = b.t().to(site.b.dtype)  # [r, out]
    site.row_r[index, first] = r
    site.row_scale[index, first] = struct.unpack("<f", struct.pack("<i", line[SCALE.value]))[0]


def _strided(
    buffer: torch.Tensor, line: list[int], columns: tuple[Any, ...], rows: int, width: int
) -> torch.Tensor:
    """[rows, width] out of the buffer, as four columns of a line say."""
    start, code, row, column = (line[place.value] for place in columns)
    dtype = DTYPES[code]
    end = start + (buffer.numel() - start) // dtype.itemsize * dtype.itemsize
    return buffer[start:end].view(dtype).as_strided((rows, width), (row, column))
