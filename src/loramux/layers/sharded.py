"""Linear layers of which each rank holds a part, and the adapters on them.

    column, default   h = A x            y + B' h                            A whole, B' this rank's rows
    column, fully     h = gather(A' x)   y + B' h                            A' every N-th rank row
    row, default      h = A' x'          reduce(y) + B reduce(h)             A' this rank's columns
    row, fully        h = reduce(A' x')  reduce(y + B' h in its columns)     B' this rank's rows

x' is this rank's part of the input, y its part of the base product (column) or its partial sum (row).
By default y and h of a row layer stand side by side and one all-reduce sums both. In small steps of
few adapters one kernel sums both and adds the delta, fully sharded too; else by default the op adds it
that follows anyway. Where a step has no work list (CPUs), reduce(y + B h) does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from loramux.kernels import (
    AFFINE,
    ONE_PLACE,
    Expand,
    LoRASite,
    WorkList,
    linear,
    lora_expand,
    lora_shrink,
    shrink_parts,
)
from loramux.layers.batch import LoRAStep, StepBatch
from loramux.layers.linear import ROW_STEP, MergedLinear, empty_affine
from loramux.parallel import Cut, Group


class ShardedLinear(MergedLinear):
    """A `MergedLinear` over this rank's parts `linears` of layers that are cut as `cuts` say, all in
    the same manner. Features count on this rank; `cuts` have those of the whole."""

    def __init__(
        self,
        linears: Sequence[nn.Linear],
        batch: StepBatch,
        cuts: Sequence[Cut],
        group: Group,
        *,
        fully: bool,
    ):
        super().__init__(linears, batch)
        self.cuts = tuple(cuts)
        self.kind = cuts[0].kind
        self.dealt_site: LoRASite | None = None  # A where its rows are dealt out, empty where not
        self._affine_site: LoRASite | None = None  # gains and shifts of whole rows, without A and B
        self._group = group
        self._deals = fully
        self._fully = fully and self.kind != "whole"
        self._outside = cuts[0].outside
        assert len(cuts) == 1 or self.kind != "row", "row layers are never merged"

    @property
    def is_product(self) -> bool:
        return self.kind == "whole"

    @property
    def outer_features(self) -> tuple[int, int]:
        if not self._outside:
            return super().outer_features
        return self.cuts[0].input.whole, sum(cut.output.whole for cut in self.cuts)

    @property
    def row_sharers(self) -> int:  # type: ignore[override]
        return self.cuts[0].deal

    @property
    def shrink_site(self) -> LoRASite | None:
        return self.dealt_site if self.cuts[0].deal > 1 else self.site

    def whole_features(self, index: int) -> tuple[int, int]:
        cut = self.cuts[index]
        return cut.input.whole, cut.output.whole

    def attach_site(
        self,
        rows: int,
        dtype: torch.dtype,
        *,
        under_weight: bool = False,
        place_rows: int = ONE_PLACE,
    ) -> None:
        """As `MergedLinear.attach_site`; what stands under the weight is this rank's part of A."""
        slices, device, cut = self.num_slices, self.device, self.cuts[0]
        padded = rows + -rows % ROW_STEP
        dealt = -(-padded // self._group.size)
        nothing = (0,) * (slices + 1)
        under = under_weight and self.takes_rows
        features = self.in_features if cut.deal > 1 and not under else 0
        if self._deals:
            self.dealt_site = empty_site(slices, dealt, features, nothing, dtype, device)
        if not self._fully:
            super().attach_site(rows, dtype, under_weight=under_weight, place_rows=place_rows)
            return
        affine = empty_affine(padded, place_rows, self.out_features, dtype, device)
        if cut.deal > 1:  # column: A [S, R/N, in] stands apart from B [R, out']
            assert self.dealt_site is not None
            if under:
                self.dealt_site = replace(self.dealt_site, a=self._stack_under(dealt))
            site = empty_site(slices, padded, 0, tuple(self.starts), dtype, device)
            self.site = replace(site, affine=affine, place_rows=place_rows)
        else:  # row: A [1, R, in'], B [R, out']
            own = (0, cut.b_output.size)
            features = 0 if under else self.in_features
            self.site = empty_site(slices, padded, features, own, dtype, device)
            if under:
                self.site = replace(self.site, a=self._stack_under(padded))
            no_rows = self.site.b.new_zeros(self.out_features).expand(padded, -1)  # [R, out]
            self._affine_site = LoRASite(
                a=self.site.a,
                b=no_rows,
                slice_starts=tuple(self.starts),
                row_r=torch.zeros_like(self.site.row_r),
                row_scale=self.site.row_scale,
                affine=affine,
                place_rows=place_rows,
            )

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, Expand | None]:
        """x [T, K], of the whole layer or of this rank -> y [T, N] likewise, and the LoRA delta that
        is still to be added."""
        cut = self.cuts[0]
        if self.kind == "row" and self._outside:
            x = x[:, cut.input.slice].contiguous()  # [T, K']
        lora, site = self._batch.lora, self.site
        expand: Expand | None
        if lora is None or site is None:
            y, expand = super().project(x)  # [T, N']
        elif self._fully and self.kind == "row":
            return self._sum_fully(x, lora, site), self._affine(lora)  # [T, N]
        elif self._fully:
            y, expand = self._project_fully(x, lora, site)  # [T, N']
        elif self.kind == "row" and not self._packed:
            return self._project_row(x, lora, site)  # [T, N]
        else:
            y, expand = super().project(x)  # [T, N']
        if self.kind == "row":
            if expand is not None:
                lora_expand(y, expand)
            y = self._group.all_reduce(y)
            return y[:, : self.out_features], self._affine(lora)
        if self._outside:
            if expand is not None:
                lora_expand(y, expand)
            return self._group.gather_columns(y, cut.output), None
        return y, expand

    def _project_row(
        self, x: torch.Tensor, lora: LoRAStep, site: LoRASite
    ) -> tuple[torch.Tensor, Expand | None]:
        """x [T, K'] -> all ranks' products summed [T, N], and the delta, if it is still to be added."""
        self.computations += 1
        width = self.out_features
        if lora.base_rows and self._stacked is not None:
            z = self.extended_product(x, lora.base_rows)  # [T, N + R']
            h = z[:, width:].unsqueeze(0)  # [1, T, R']
        else:
            parts = shrink_parts(x.shape[0], self.in_features, lora.work.max_chunks)
            columns = lora.width + -lora.width % ROW_STEP  # rows stay aligned
            z = x.new_empty(x.shape[0], width + parts * columns)  # [T, N + P W]
            h = z[:, width:].unflatten(1, (parts, columns)).transpose(0, 1)  # [P, T, W]
            self._shrink_beside(x, lora, site, h, z[:, :width])
        if h.shape[0] == 1:
            y = self._group.sum_and_expand(z, width, site, lora.work)
            if y is not None:
                return y, None  # [T, N]
        z = self._group.all_reduce(z)  # the same shape
        return z[:, :width], Expand(site, h, lora.work)

    def _project_fully(
        self, x: torch.Tensor, lora: LoRAStep, site: LoRASite
    ) -> tuple[torch.Tensor, Expand]:
        """x [T, K] -> y [T, N'] of a column layer, and its delta."""
        z, parts = self._shrink_fully(x, lora, site)
        h = self._group.gather_runs(parts, self.num_slices)  # [T, W]: row k from rank k % N
        y = self._base(x) if z is None else z[:, : self.out_features]
        return y, Expand(site, h.unsqueeze(0), lora.work)

    def _sum_fully(self, x: torch.Tensor, lora: LoRAStep, site: LoRASite) -> torch.Tensor:
        """x [T, K'] -> [T, N] of a row layer, summed over all ranks with the deltas, which each adds to
        its own columns first."""
        assert lora.deltas is not None
        width = self.out_features
        z, parts = self._shrink_fully(x, lora, site)
        if z is not None:
            y = self._group.sum_and_expand(z, width, site, lora.deltas)
            if y is not None:
                return y  # [T, N]
        h = self._group.sum_parts(parts)  # [T, W]
        y = self._base(x) if z is None else z  # [T, N] or [T, N + R']
        part = y[:, self.cuts[0].b_output.slice]  # [T, out']
        lora_expand(part, Expand(site, h.unsqueeze(0), lora.deltas))
        return self._group.all_reduce(y)[:, :width]

    def _shrink_fully(
        self, x: torch.Tensor, lora: LoRAStep, site: LoRASite
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """x [T, K'] -> the base product with it [T, N' + W'], if it came out of that, and what this rank
        makes of A x [P, T, W']."""
        self.computations += 1
        if lora.base_rows and self._stacked is not None:
            z = self.extended_product(x, lora.base_rows)  # [T, N' + S R']
            return z, z[:, self.out_features :].unsqueeze(0)
        return None, self._shrink_own(x, site, lora)

    def _shrink_own(self, x: torch.Tensor, site: LoRASite, lora: LoRAStep) -> torch.Tensor:
        """x [T, K'] -> [P, T, W'], what this rank makes of A x by a kernel."""
        if self.kind == "row":
            return self._shrink(x, site, lora.work, lora.columns)
        assert self.dealt_site is not None and lora.dealt is not None
        width = -(-lora.columns // self.cuts[0].deal)
        return self._shrink(x, self.dealt_site, lora.dealt, width)

    def _affine(self, lora: LoRAStep | None) -> Expand | None:
        """Gains and shifts behind the sum over all ranks, where the deltas are in it already."""
        if lora is None or lora.affine is None or self._affine_site is None:
            return None
        site = self._affine_site
        return Expand(site, site.a.new_empty(1, 1, 1), lora.affine)

    @property
    def affine(self) -> torch.Tensor | None:
        """Gains and shifts of all that this rank puts out [2, P, out']."""
        site = self._affine_site or self.site
        return None if site is None else site.affine

    def _shrink(self, x: torch.Tensor, site: LoRASite, work: WorkList, width: int) -> torch.Tensor:
        """x [T, K'] -> [P, T, width S], which is about to travel: of many tokens in the type of x.
        Columns that no member owns hold anything."""
        parts = shrink_parts(x.shape[0], self.in_features, work.max_chunks)
        dtype = x.dtype if parts == 1 else torch.float32
        h = x.new_empty(parts, x.shape[0], width * self.num_slices, dtype=dtype)  # [P, T, W]
        lora_shrink(x, site, work, h)
        return h

    def _base(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, K'] -> [T, N'] without adapters."""
        if self._packed is not None:
            return self._packed(x)  # [T, N']
        assert self.weight is not None
        return linear(x, self.weight, self.bias)  # [T, N']


def deal_out(work: WorkList, deal: int) -> WorkList:
    """`work` in rows of A as each rank has them, when rank row k is on rank k % deal.

    Pool rows and columns of all members are multiples of `deal`, so they are the same everywhere; of
    how many rows a rank really has, `LoRASite.row_r` is the judge."""
    chunks = work.chunks.clone()  # [C, 8]
    chunks[:, 4] //= deal
    chunks[:, 5] //= deal
    chunks[:, 7] = (chunks[:, 7] % AFFINE + deal - 1) // deal  # [C]
    return replace(
        work,
        chunks=chunks,
        member_rows=work.member_rows // deal,
        member_columns=work.member_columns // deal,
        member_ranks=(work.member_ranks % AFFINE + deal - 1) // deal,
        affine=False,
    )


def parted(work: WorkList) -> tuple[WorkList, WorkList | None]:
    """`work` without gains and shifts, and with nothing else, if there may be any."""
    if not work.affine:
        return work, None
    deltas, affine = work.chunks.clone(), work.chunks.clone()  # [C, 8] each
    deltas[:, 7] %= AFFINE
    affine[:, 7] -= deltas[:, 7]
    ranks = work.member_ranks % AFFINE  # [M]
    return (
        replace(work, chunks=deltas, member_ranks=ranks, affine=False),
        replace(work, chunks=affine, member_ranks=work.member_ranks - ranks),
    )


def empty_site(
    slices: int,
    rows: int,
    features: int,
    starts: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    experts: int = 1,
) -> LoRASite:
    """An empty part of the pool, of `rows` rank rows over all `experts`."""
    return LoRASite(
        a=torch.zeros(slices, rows, features, dtype=dtype, device=device),
        b=torch.zeros(rows, starts[-1], dtype=dtype, device=device),
        slice_starts=starts,
        row_r=torch.zeros(slices, rows, dtype=torch.int32, device=device),
        row_scale=torch.zeros(slices, rows, dtype=torch.float32, device=device),
        experts=experts,
    )
