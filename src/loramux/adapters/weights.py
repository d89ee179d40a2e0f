"""An adapter in host memory: the bytes of its file in one buffer, and where each matrix stands.

    file    | header | A B A B ...                        |
    buffer           | A B A B ...                        |   the same bytes, in one read

Nothing is cast or transposed here. That happens when rank rows are written, on the device where it
costs least; and a buffer that equals its file can be filled again without parsing or hashing, as
long as the file is the one that was checked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from loramux.adapters.files import FileChanged, read_into
from loramux.adapters.host_cache import HostMemory
from loramux.adapters.tokenizers import OwnTokenizer
from loramux.types import AdapterRef

Vectors = Mapping[str, torch.Tensor]
"""Gains and shifts of modules: [2, out] each, on the CPU."""

RACY_S = 2.0  # the coarsest clock of a file system in use


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Equal as long as nobody has written to the file or put another in its place."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int  # what restores the other time, as `cp -p` does, moves this one

    @classmethod
    def of(cls, stat: os.stat_result) -> FileIdentity:
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    def is_settled(self, now_s: float) -> bool:
        """Whether a write from now on must show: a clock tick has passed since the last one."""
        return self.modified_ns < (now_s - RACY_S) * 1e9


@dataclass(frozen=True, slots=True)
class Stored:
    """A matrix [rows, columns] of `dtype`, contiguous, from byte `offset` of the buffer on."""

    offset: int
    rows: int
    columns: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.rows * self.columns * self.dtype.itemsize

    @property
    def end(self) -> int:
        """The byte after the last one."""
        return self.offset + self.num_bytes

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        flat = buffer[self.offset : self.end]  # [num_bytes]
        return flat.view(self.dtype).view(self.rows, self.columns)  # [rows, columns]


@dataclass(frozen=True, slots=True)
class StoredPair:
    """Both factors of one module as PEFT saves them: `a` [r, in], `b` [out, r]."""

    a: Stored
    b: Stored
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class StoredFactor:
    """One factor of all experts. Expert e's element [i, j] is the one at `offsets[e]` bytes plus
    i * row_strides[e] + j * column_strides[e] elements of `dtype`; experts may share their bytes."""

    offsets: np.ndarray  # [E] int64
    row_strides: np.ndarray  # [E] int64
    column_strides: np.ndarray  # [E] int64
    dtype: torch.dtype
    alternating: bool = False
    """Whether the file has row i of the model at 2i, and row rows/2 + i at 2i + 1."""

    def view(self, buffer: torch.Tensor, expert: int, rows: int, columns: int) -> torch.Tensor:
        """[rows, columns] in the order of the model: strided; or, where rows alternate, a copy."""
        start, size = int(self.offsets[expert]), self.dtype.itemsize
        end = start + (buffer.numel() - start) // size * size
        strides = (int(self.row_strides[expert]), int(self.column_strides[expert]))
        stored = buffer[start:end].view(self.dtype).as_strided((rows, columns), strides)
        if not self.alternating:
            return stored  # [rows, columns]
        return torch.cat((stored[0::2], stored[1::2]))  # [rows, columns]


@dataclass(frozen=True, slots=True, eq=False)
class StoredExperts:
    """Both factors of one projection of all experts of a layer: `a` [r[e], in] and `b` [out, r[e]],
    the canonical form of every layout that adapters for experts come in."""

    a: StoredFactor
    b: StoredFactor
    r: np.ndarray  # [E] int32; 0: this expert has no LoRA, and its offsets mean nothing
    scales: np.ndarray  # [E] float32
    in_features: int
    out_features: int

    @property
    def num_elements(self) -> int:
        """Of A and B of all experts, each counted as its own although experts may share bytes."""
        return int(self.r.sum()) * (self.in_features + self.out_features)

    def views(
        self, buffer: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, float]]:
        """(expert, a [r, in], b [out, r], scale) of those that have LoRA."""
        for expert in np.flatnonzero(self.r).tolist():
            r = int(self.r[expert])
            a = self.a.view(buffer, expert, r, self.in_features)  # [r, in]
            b = self.b.view(buffer, expert, self.out_features, r)  # [out, r]
            yield expert, a, b, float(self.scales[expert])


@dataclass(frozen=True, slots=True)
class StoredHead:
    """A classification head: `weight` [labels, D], `bias` [1, labels] if it has one, and the names of
    its labels."""

    weight: Stored
    bias: Stored | None
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StoredRows:
    """Rows [n, D] of an embedding or an output head, and the tokens `ids` [n] int64 that they are of."""

    ids: np.ndarray
    rows: Stored


@dataclass(frozen=True, slots=True, eq=False)
class StoredVocabulary:
    """What an adapter changes of a vocabulary, which then has `size` tokens; `names` are those of the
    model's embedding and head. All of it lies behind the first `start` bytes of the buffer.

    Of `embedding` and `head` a later part replaces what an earlier one has of the same token. LoRA on
    the embedding is `a` [r, size], `b` [D, r]; on the head `a` [r, D], `b` [size, r]."""

    size: int
    names: tuple[str, str]
    start: int
    embedding: tuple[StoredRows, ...] = ()
    head: tuple[StoredRows, ...] = ()
    embedding_lora: StoredPair | None = None
    head_lora: StoredPair | None = None

    @property
    def num_rows(self) -> int:
        """Of the embedding or of the head, whichever has more of its own."""
        return max(_num_ids(parts) for parts in (self.embedding, self.head))

    @property
    def loras(self) -> dict[str, StoredPair]:
        """By module."""
        pairs = zip(self.names, (self.embedding_lora, self.head_lora), strict=True)
        return {name: pair for name, pair in pairs if pair is not None}


def _num_ids(parts: tuple[StoredRows, ...]) -> int:
    if not parts:
        return 0
    return len(np.unique(np.concatenate([part.ids for part in parts])))


@dataclass(frozen=True, slots=True)
class StoredVectors:
    """What one linear layer has beside its factors, [1, out] each: DoRA's magnitude, the bias of lora_B,
    and the bias that takes the place of the base model's."""

    magnitude: Stored | None = None
    lora_bias: Stored | None = None
    bias: Stored | None = None

    @property
    def columns(self) -> int:
        """out."""
        return next(s.columns for s in (self.magnitude, self.lora_bias, self.bias) if s)


@dataclass(frozen=True, slots=True)
class Layout:
    """What stands where. `runs` are (offset in the file, offset in the buffer, bytes); one is usual."""

    pairs: dict[str, StoredPair]
    runs: tuple[tuple[int, int, int], ...]
    experts: dict[str, StoredExperts] = field(default_factory=dict)
    head: StoredHead | None = None
    vectors: dict[str, StoredVectors] = field(default_factory=dict)
    vocabulary: StoredVocabulary | None = None

    @property
    def num_bytes(self) -> int:
        if not self.runs:  # of a copy of the base model's rows, nothing is kept
            return 0
        _, offset, size = self.runs[-1]
        return offset + size

    @property
    def layer_bytes(self) -> int:
        """Bytes, from the start of the buffer, that have all factors of layers."""
        return self.vocabulary.start if self.vocabulary else self.num_bytes


def place(tensors: Iterable[tuple[int, int, int]]) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Buffer offsets of (offset in the file, bytes, bytes an element), and the runs to read.

    Tensors keep their distance, so that one read takes them all, unless the file has left one where
    its elements are not aligned. `tensors` come in the order of the file.
    """
    offsets: list[int] = []
    runs: list[tuple[int, int, int]] = []
    end = 0
    for start, size, itemsize in tensors:
        offset = -(-end // itemsize) * itemsize
        if runs and (runs[-1][0] + runs[-1][2], end) == (start, offset):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + size)
        else:
            runs.append((start, offset, size))
        offsets.append(offset)
        end = offset + size
    return offsets, runs


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """The files of an adapter as they were when they were checked."""

    config_path: Path
    config: FileIdentity
    weights_path: Path
    weights: FileIdentity
    layout: Layout
    read_s: float
    """Wall-clock time at which reading began."""
    origin: str = ""
    """Where the files were downloaded from; empty for a folder of this machine."""

    def read(self, memory: HostMemory) -> torch.Tensor:
        """The bytes [num_bytes] uint8. Raises FileChanged, or another OSError."""
        view = memory.take(self.layout.num_bytes)
        with open(self.weights_path, "rb", buffering=0) as file:
            self._check(os.fstat(file.fileno()))
            for start, offset, size in self.layout.runs:
                read_into(file.fileno(), start, view[offset : offset + size])
            self._check(os.fstat(file.fileno()))
        return torch.frombuffer(view, dtype=torch.uint8)  # [num_bytes]

    def read_again(self, memory: HostMemory) -> torch.Tensor | None:
        """As `read`, or None unless it is certain that these are the bytes that were checked."""
        settled = self.config.is_settled(self.read_s) and self.weights.is_settled(self.read_s)
        try:
            if not settled or FileIdentity.of(self.config_path.stat()) != self.config:
                return None
            return self.read(memory)
        except OSError:
            return None  # a full read says what is wrong

    def _check(self, stat: os.stat_result) -> None:
        if FileIdentity.of(stat) != self.weights:
            raise FileChanged("it was changed while it was read")


def now_s() -> float:
    """The clock that files are stamped with."""
    return time.time()


@dataclass(frozen=True, slots=True)
class LoRAPair:
    """Both factors of one module: delta(x) = scale * (x @ a.T) @ b.

    `a` [r, in] and `b` [r, out] are views of the buffer in the dtype of the file; `b` is PEFT's
    lora_B seen transposed, so its rows are strided. `scale` is the adapter's own alpha/r factor,
    applied in fp32.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def r(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterWeights:
    """One version of an adapter: its bytes, `buffer` [num_bytes] uint8 on the CPU, and its source.

    `affine` has the gains and shifts of modules [2, out] on the CPU, once they have been worked out.
    `tokenizer` is the one it brings, where it was read to be served."""

    ref: AdapterRef
    buffer: torch.Tensor
    source: AdapterSource
    affine: Vectors = field(default_factory=dict)
    tokenizer: OwnTokenizer | None = None

    @property
    def layout(self) -> Layout:
        return self.source.layout

    def from_origin(self, origin: str) -> AdapterWeights:
        """The same, as downloaded from `origin`."""
        source = replace(self.source, origin=origin)
        return replace(self, ref=replace(self.ref, source=origin), source=source)

    @cached_property
    def pairs(self) -> dict[str, LoRAPair]:
        """Module name -> factors; made when first asked for, since a GPU needs only the bytes."""
        return self._views(self.layout.pairs)

    @property
    def every_pair(self) -> dict[str, LoRAPair]:
        """`pairs`, and those of the embedding (of tokens as one-hot rows) and the output head."""
        vocabulary = self.layout.vocabulary
        return self.pairs | (self._views(vocabulary.loras) if vocabulary else {})

    def _views(self, pairs: Mapping[str, StoredPair]) -> dict[str, LoRAPair]:
        return {
            module: LoRAPair(pair.a.view(self.buffer), pair.b.view(self.buffer).t(), pair.scale)
            for module, pair in pairs.items()
        }
