"""The one rule that cuts W, A and B of a linear layer.

column  W [out, in] cut along out         row  W cut along in
rank 0  ▒▒▒▒▒▒▒▒                               ▒▒▒▒░░░░   each rank's product is a partial sum,
rank 1  ░░░░░░░░                               ▒▒▒▒░░░░   added up by an all-reduce
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["whole", "column", "row"]

# transformers' names of styles -> (how W is cut, whether the layer's outer side is whole on every rank)
STYLES: dict[str, tuple[Kind, bool]] = {
    "colwise": ("column", False),
    "colwise_gather_output": ("column", True),
    "colwise_rep": ("column", True),
    "rowwise": ("row", False),
    "rowwise_split_input": ("row", True),
    "rowwise_rep": ("row", True),
    "replicated_with_grad_allreduce": ("whole", False),
}


@dataclass(frozen=True, slots=True)
class Stripe:
    """Places [start, stop) of a dimension of `whole` places."""

    start: int
    stop: int
    whole: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


def all_of(whole: int) -> Stripe:
    """The stripe that is the whole dimension."""
    return Stripe(0, whole, whole)


def stripe(whole: int, size: int, rank: int, unit: int = 1) -> Stripe:
    """This rank's part of `whole` places in units that stay together: ceil(units / size) units a
    rank, fewer on the last ones. Raises ValueError when a rank would get none."""
    units = whole // unit
    share = -(-units // size)
    if units * unit != whole or share * (size - 1) >= units:
        raise ValueError(f"{units} parts of {unit} cannot be dealt out to {size} ranks")
    start = share * rank
    return Stripe(start * unit, min(units, start + share) * unit, whole)


def head_stripe(whole: int, size: int, rank: int, unit: int) -> Stripe:
    """As `stripe`, in heads of `unit` places: the same number on each rank, or, where there are fewer
    heads than ranks, one head on several. Raises ValueError when neither comes out even."""
    heads = whole // unit
    if heads % size == 0:
        return stripe(whole, size, rank, unit)
    if heads * unit != whole or size % heads:
        raise ValueError(f"{heads} heads cannot be dealt out evenly to {size} ranks")
    head = rank * heads // size
    return Stripe(head * unit, (head + 1) * unit, whole)


@dataclass(frozen=True, slots=True)
class Cut:
    """What one rank holds of a linear layer W [out, in], and of A [r, in] and B [out, r] on it.

                        W                A                 B
    column, default     rows `output`    whole             rows `b_output` = `output`
    column, fully       the same         every N-th row    the same
    row, default        columns `input`  columns `input`   whole
    row, fully          the same         the same          rows `b_output`
    """

    kind: Kind
    output: Stripe
    input: Stripe
    b_output: Stripe
    deal: int = 1
    """Rank row k of A is on rank k % deal; 1: all of them are here."""

    outside: bool = False
    """Whether the layer takes and gives whole vectors: a column layer then gathers its output, a row
    layer takes its part of the input."""


def cut_linear(
    style: str | None,
    shape: tuple[int, int],
    size: int,
    rank: int,
    *,
    head: int = 0,
    fully: bool = False,
) -> Cut:
    """The part of rank `rank` of `size` of a layer of `shape` (out, in) under transformers' `style`.

    `head` > 0: its features are heads of so many, which stay together. `fully`: `fully_sharded_loras`.
    Raises ValueError with the reason when it cannot be cut so.
    """
    out_features, in_features = shape
    outputs, inputs = all_of(out_features), all_of(in_features)
    if style is not None and style not in STYLES:
        raise ValueError(f"the style {style!r} is not served")
    kind, outside = STYLES[style] if style is not None else ("whole", False)
    if kind == "column":
        heads = head_stripe(out_features, size, rank, head) if head else None
        part = heads or stripe(out_features, size, rank)
        return Cut(kind, part, inputs, part, size if fully else 1, outside)
    if kind == "row":
        if head and in_features // head % size:  # a head on two ranks would count twice
            raise ValueError(
                f"{in_features // head} heads cannot be dealt out evenly to {size} ranks"
            )
        part = stripe(in_features, size, rank, head or 1)
        b_output = stripe(out_features, size, rank) if fully else outputs
        return Cut(kind, outputs, part, b_output, 1, outside)
    return Cut("whole", outputs, inputs, outputs)
