"""One set of tensors for `loramux bench kernels`: a linear, its adapters, and the pieces on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from loramux.bench.case import linear_shapes
from loramux.engine.packing import chunk_rows
from loramux.kernels import (
    Expand,
    LoRASite,
    WorkList,
    add_rms_norm,
    gated,
    lora_expand,
    lora_shrink,
    rope_kv,
    shrink_parts,
)

BLOCK = 16
CONTEXT = 128


class KernelSet:
    """A merged linear with the A rows of `adapters` adapters of rank `r` under its weight."""

    def __init__(
        self,
        config: dict[str, Any],
        linear: str,
        parts: Sequence[str],
        adapters: int,
        r: int,
        device: str,
    ):
        shapes = [linear_shapes(config)[part] for part in parts]
        self.device = torch.device(device)
        self.config, self.linear, self.r = config, linear, r
        self.inputs = shapes[0][0]
        self.starts = [0]
        for _, outputs in shapes:
            self.starts.append(self.starts[-1] + outputs)
        self.outputs, self.slices = self.starts[-1], len(shapes)
        rows = max(1, adapters * r)
        self.weight = self._random(self.outputs + rows * self.slices, self.inputs)
        a = self.weight[self.outputs :].view(rows, self.slices, self.inputs).transpose(0, 1)
        row_r = torch.zeros(self.slices, rows, dtype=torch.int32, device=self.device)
        row_r[:, ::r] = r if adapters else 0
        self.site = LoRASite(
            a=a,
            b=self._random(rows, self.outputs),
            slice_starts=tuple(self.starts),
            row_r=row_r,
            row_scale=torch.ones(self.slices, rows, device=self.device),
        )
        hidden = config["hidden_size"]
        self.norm = self._random(hidden)
        self._pieces: dict[str, Callable[[], object]] = {}

    def run(self, piece: str) -> None:
        self._pieces[piece]()

    def prepare(self, batch: int, adapters: int) -> None:
        """Make the inputs of a step of `batch` tokens; token t has adapter t * adapters // batch."""
        x = self._random(batch, self.inputs)
        appended = adapters * self.r * self.slices
        whole = self._random(batch, self.outputs + appended)  # [T, N + S R]
        y, weight = self._random(batch, self.outputs), self.weight[: self.outputs]
        with_a = self.weight[: self.outputs + appended]
        fold = self._fold(batch)
        self._pieces = {
            "gemm": lambda: F.linear(x, weight),
            "gemm_a": lambda: F.linear(x, with_a),
            "fold": lambda: fold(y, None),
        }
        if not adapters:
            return
        pool = self.work(batch, adapters, in_product=False)
        inside = self.work(batch, adapters, in_product=True)
        partial_sums = shrink_parts(batch, self.inputs, pool.max_chunks)
        h = torch.zeros(
            partial_sums, batch, self.r * self.slices, dtype=torch.float32, device=self.device
        )  # [P, T, W]
        from_pool = Expand(self.site, h, pool)
        from_product = Expand(self.site, whole[:, self.outputs :].unsqueeze(0), inside)
        left = whole[:, : self.outputs]  # [T, N]
        self._pieces |= {
            "shrink": lambda: lora_shrink(x, self.site, pool, h),
            "expand": lambda: lora_expand(y, from_pool),
            "expand_a": lambda: lora_expand(left, from_product),
            "fold_expand": lambda: fold(left, from_product),
            "fold_pool": lambda: fold(y, from_pool),
        }

    def _fold(self, batch: int) -> Callable[[torch.Tensor, Expand | None], object]:
        """The kernel behind this linear, as a function of the product and a delta."""
        config = self.config
        if self.linear == "gate_up":
            return lambda y, expand: gated(y, "silu", expand)
        if self.linear != "qkv":
            residual = self._random(batch, config["hidden_size"])
            eps = float(config.get("rms_norm_eps", 1e-5))
            return lambda y, expand: add_rms_norm(
                y, residual, self.norm, eps, "llama", None, expand
            )
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = (self.starts[2] - self.starts[1]) // size
        blocks = -(-batch * CONTEXT // BLOCK)
        caches = [self._random(blocks, BLOCK, kv_heads, size) for _ in range(2)]
        table = torch.rand(CONTEXT, size, device=self.device)  # [P, rot]
        tokens = torch.arange(batch, device=self.device)
        positions = (tokens % CONTEXT).to(torch.int32)  # [T]
        slots = tokens * CONTEXT + positions  # [T]
        if self.device.type == "cuda":
            slots = slots.to(torch.int32)
        return lambda y, expand: rope_kv(
            y, table, positions, slots, caches[0], caches[1], heads, None, 0.0, "llama", expand
        )

    def work(self, batch: int, adapters: int, *, in_product: bool) -> WorkList:
        """One run of tokens an adapter, cut into chunks of at most `rows_per_chunk`.

        Behind a product with A rows a member stands in the columns of its pool rows; a kernel of
        its own writes each token's ranks from column 0.
        """
        rows_per_chunk = chunk_rows(batch)
        cuts = [-(-k * batch // adapters) for k in range(adapters + 1)]
        rows = [k * self.r for k in range(adapters)]
        columns = rows if in_product else [0] * adapters
        one = int(torch.ones(1).view(torch.int32))  # the bits of the scale
        chunks = [
            [at, min(at + rows_per_chunk, cuts[k + 1]), k, k + 1, rows[k], columns[k], one, self.r]
            for k in range(adapters)
            for at in range(cuts[k], cuts[k + 1], rows_per_chunk)
        ]

        def ints(values: list[Any]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        return WorkList(
            chunks=ints(chunks),
            counts=ints([0, len(chunks)]),
            member_rows=ints(rows),
            member_columns=ints(columns),
            member_scales=torch.ones(adapters, device=self.device),
            member_ranks=ints([self.r] * adapters),
            rows_per_chunk=rows_per_chunk,
            max_chunks=len(chunks),
            max_ranks=self.r,
        )

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device).mul_(0.02).to(torch.bfloat16)
