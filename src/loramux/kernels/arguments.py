"""What the ops of `loramux.kernels` are told beside plain tensors; the layers build these.

Some may carry a note that one implementation leaves for itself (pointers already looked up,
lists already split) in `notes`; nobody else reads it. The objects are therefore built anew when a
tensor in them is replaced, never edited.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

NormMode = Literal["llama", "plain", "gemma"]
"""Where an RMS norm rounds: `llama` weight * cast(norm); `plain` cast(norm * weight), as in OLMo 2
and gpt-oss; `gemma` cast(norm * (1 + weight))."""

Activation = Literal["silu", "gelu_tanh"]
"""What a gated MLP does to its gate."""


AFFINE = 1 << 16
"""In `WorkList.member_ranks`: the adapter has gains and shifts, see `LoRASite.affine`."""

ONE_PLACE = 1 << 30
"""`LoRASite.place_rows` where all rows of the pool share one place, which holds zeros."""


@dataclass(frozen=True, slots=True, eq=False)
class LoRASite:
    """The adapter pool as one (merged) linear layer sees it: `S` slices share the input.

    An adapter of rank r with first row p owns rows p..p+r-1. Rows that nobody owns may hold
    anything, NaN included.
    """

    a: torch.Tensor
    """[S, R, in], last dim contiguous, f32 / bf16 / f16: the A matrices, one row per rank and slice.
    Contiguous on a CPU; on a GPU row (s, k) may stand at k * S + s, under the base weight."""

    b: torch.Tensor
    """[R, N], contiguous, dtype of `a`: row k is row k of B^T, all slices side by side."""

    slice_starts: tuple[int, ...]
    """S+1 column offsets into N: slice s owns columns slice_starts[s]:slice_starts[s+1]."""

    row_r: torch.Tensor
    """[S, R] int32: rank of the adapter whose first row this is; 0: it leaves the slice alone."""

    row_scale: torch.Tensor
    """[S, R] float32: alpha/r (or its rsLoRA form) of the adapter whose first row this is."""

    experts: int = 1
    """R is so many times a pool: row k of the pool is, for expert e, row e * (R // experts) + k."""

    affine: torch.Tensor = None  # type: ignore[assignment]
    """[2, P, N], contiguous, dtype of `a`: in place p // `place_rows` of an adapter with first row p
    what is done to the layer's output once its delta is in it: y + y * affine[0] + affine[1]. That is
    how DoRA's norms and trained biases are served. Left away: zeros, in one place for all."""

    place_rows: int = ONE_PLACE

    notes: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        slices, rows, _ = self.a.shape
        width = self.slice_starts[-1]
        if self.affine is None:
            object.__setattr__(self, "affine", self.b.new_zeros(2, 1, width))
        expected = {
            "b": (self.b, (rows, width), self.a.dtype),
            "row_r": (self.row_r, (slices, rows), torch.int32),
            "row_scale": (self.row_scale, (slices, rows), torch.float32),
            "a": (self.a, tuple(self.a.shape), self.a.dtype),
            "affine": (self.affine, (2, self.affine.shape[1], width), self.a.dtype),
        }
        for name, (tensor, shape, dtype) in expected.items():
            if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.stride(-1) != 1:
                raise ValueError(f"LoRASite.{name} must be a {shape} of {dtype} in rows")
            if name not in ("a", "b") and not tensor.is_contiguous():
                raise ValueError(f"LoRASite.{name} must be contiguous")
        if not (self.b.is_contiguous() or self.b.stride(0) == 0):  # no rows that anybody reads
            raise ValueError("LoRASite.b must be contiguous")
        starts = self.slice_starts
        if len(starts) != slices + 1 or starts[0] != 0 or list(starts) != sorted(starts):
            raise ValueError(f"slice_starts {starts} do not cut {width} columns in {slices}")

    @property
    def num_slices(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Which tokens of a step take which adapters. Tokens in no segment belong to the base model.

    Segments do not overlap; an empty one (start == end) is allowed. Segment g adds the members
    member_offsets[g] .. member_offsets[g+1]-1. All tensors contiguous, on the ops' device.
    """

    starts: torch.Tensor
    """[G] int32: first token."""

    ends: torch.Tensor
    """[G] int32: one past the last token."""

    member_offsets: torch.Tensor
    """[G+1] int32."""

    member_rows: torch.Tensor
    """[M] int32: first pool row p of each member's adapter."""

    member_scales: torch.Tensor
    """[M] float32: the request's own factor, on top of `LoRASite.row_scale`."""

    num_segments: int
    """G; with 0 an op returns without looking at the tensors."""

    affine_rows: frozenset[int] = frozenset()
    """Those of `member_rows` whose adapters have gains and shifts, see `LoRASite.affine`."""

    notes: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class WorkList:
    """What `Segments` says, cut into chunks of rows that one program can hold; for GPU kernels.

    Every row that counts is in exactly one chunk; all rows of a chunk have the same members. Chunks
    without members (rows of the base model) come first. The number of chunks is read on the device,
    so no grid depends on it: a captured graph is right for every mixture that fits `max_chunks`.
    """

    chunks: torch.Tensor
    """[C, 8] int32: first row, end row, first member, end member; and again what stands in the
    lists below of the first member: row, column, bits of the scale, rank (a kernel then waits for
    memory once less). From the chunks in use to `max_chunks` <= C they have no rows (0, 0).
    A row that differs from the list's, because it is an expert's, moves all members of the chunk."""

    counts: torch.Tensor
    """[2] int32: chunks without members, chunks in use."""

    member_rows: torch.Tensor
    """[M] int32: first pool row p of each member's adapter."""

    member_columns: torch.Tensor
    """[M] int32: where the member's shrunk activations stand, see `Expand.h`."""

    member_scales: torch.Tensor
    """[M] float32: the request's own factor, on top of `LoRASite.row_scale`."""

    member_ranks: torch.Tensor
    """[M] int32: rank rows of each member's adapter, its largest rank in any module; plus `AFFINE`
    where it has gains and shifts."""

    rows_per_chunk: int
    """Rows of the largest chunk: 8, 16 or 64."""

    max_chunks: int
    """No step has more chunks than this."""

    row_chunks: torch.Tensor | None = None
    """[T] int32: the chunk of each row, where every row is in one: in a `Routing`."""

    affine: bool = False
    """Whether any member may have gains and shifts: kernels without them are a little faster."""

    max_ranks: int = 0
    """The most rank rows that a member may have, 0 where that is not known. Kernels ask for so many at
    once where that is faster; answers do not depend on it."""

    notes: dict[str, Any] = field(default_factory=dict, init=False, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """In which order the pairs of token and expert are computed; S = T * K of them.

    Sorted by expert, then by composition, then by pair: what an expert computes stands together,
    and in it what takes the same adapters. Every tensor is on the ops' device, and no size depends
    on what it holds: a captured graph is right for every choice of experts.
    """

    order: torch.Tensor
    """[S] int32: the pair t * K + k at each sorted row."""

    places: torch.Tensor
    """[S] int32: the sorted row of each pair, the inverse of `order`."""

    ends: torch.Tensor
    """[E] int32: one past the last sorted row of each expert."""

    work: WorkList | None
    """The sorted rows in chunks of one expert and one composition; the members' lists are the
    step's. Every row is in a chunk; those without members stand among the others, `counts[0]` is 0.
    Behind the chunks in use are zeros. None: the step has no adapters."""


@dataclass(frozen=True, slots=True, eq=False)
class Expand:
    """A LoRA delta that has been shrunk and not yet added: an op folds it into its own pass.

    The delta of row t is the sum over its members of member_scale * row_scale[s, p] times
    h[t] @ b[p:p+r, columns of s], with r = row_r[s, p]. A member with gains and shifts does to the
    output, all deltas up to its own included, what `LoRASite.affine` says, one after the other.
    """

    site: LoRASite

    h: torch.Tensor
    """[P, T, W], last dim contiguous: P partial sums of the shrunk activations, added up by the
    reader in float32 and then rounded to the dtype of `site.b`. Rank k of slice s of a member
    stands in column (member_column + k) * S + s. Columns that no member owns hold anything."""

    work: WorkList


@dataclass(frozen=True, slots=True, eq=False)
class AttentionBatch:
    """Where the sequences of a step lie in the query rows and in the paged cache.

    Sequence i owns query rows query_starts[i]:query_starts[i+1]; they stand at positions
    context_lens[i]-q_len .. context_lens[i]-1. Position p lies in slot
    block_tables[i, p // block_size] * block_size + p % block_size.
    """

    block_tables: torch.Tensor
    """[Q, max_blocks] int32; entries past a sequence's last block are never read."""

    query_starts: list[int]
    """Q+1 row offsets."""

    context_lens: list[int]
    """Q lengths in tokens, this step's tokens included."""

    query_starts_tensor: torch.Tensor
    """[Q+1] int32: `query_starts` on the ops' device."""

    context_lens_tensor: torch.Tensor
    """[Q] int32: `context_lens` on the ops' device."""

    max_queries: int = 0
    """No sequence has more query rows than this; 0: look at `query_starts`. A captured graph keeps
    the bound that it was captured with."""

    last_keys: torch.Tensor | None = None
    """[T] int32, contiguous, on the ops' device: the last position that each query row sees, where it
    sees more than those up to its own. A row whose entry is not beyond its own position (-1, say) is
    causal, and None says that all are. Keys up to there must be in the cache; a window's lower end stays
    where it is. Not for captured graphs."""

    notes: dict[str, Any] = field(default_factory=dict, repr=False)
