"""Sums over GPUs with the LoRA delta behind them, as one kernel and as two: python bench/deltas.py

A row layer's products and shrunk activations [tokens, columns + adapters * r] of all ranks are summed,
and the delta is added: one after the other, and by `kernels.triton_sum_expand` or `..._in_two`, which
take some of the cases. By default each rank adds it to the sums; fully sharded each adds it to its own
columns before, for which the shrunk activations are summed first. Every call of a graph has adapters of
its own, so that they come from memory. Microseconds of one call, as the median of many replays of a
graph that has several.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from collectives import Settings, microseconds, sit
from loramux.bench.geometry import geometry
from loramux.bench.kernel_set import KernelSet
from loramux.kernels import Expand, LoRASite, lora_expand
from loramux.parallel import Group

COLUMNS = (4096, 8192)
TOKENS = (1, 8, 64)
ADAPTERS = ("16:1", "16:8", "16:16", "16:32", "64:1", "64:2", "64:8", "64:32")


@dataclass(frozen=True, slots=True)
class Cases(Settings):
    """`adapters`: r and how many."""

    columns: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    adapters: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """None: as one kernel there is none for such a step."""

    fully: bool
    columns: int
    tokens: int
    rank: int
    adapters: int
    sum_us: float
    one_after_the_other_us: float
    as_one_us: float | None
    taken: bool
    """Whether a layer would have it as one."""


def rows(cases: Cases, group: Group, device: torch.device) -> Iterator[Row]:
    for fully, columns, (rank, adapters), tokens in itertools.product(
        (False, True), cases.columns, cases.adapters, cases.tokens
    ):
        if adapters <= tokens:
            yield _row(_Case(cases, group, device, fully, columns, tokens, rank, adapters))


def _row(case: _Case) -> Row:
    total = case.microseconds(lambda _: case.group.sum_parts(case.z.unsqueeze(0)))
    apart = case.microseconds(case.one_after_the_other)
    exchange = case.group.exchange
    one, taken = None, False
    step = (case.z, case.columns, case.site, case.work)
    if exchange is not None and exchange.can_take_delta(*step):
        one = case.microseconds(
            lambda site: exchange.sum_and_expand(case.z, case.columns, site, case.work)
        )
        taken = exchange.takes_delta(*step)
    said = (case.fully, case.columns, case.tokens, case.rank, case.adapters)
    return Row(*said, total, apart, one, taken)


class _Case:
    """Sums are in place: with every call the numbers grow, to infinity before long."""

    def __init__(
        self,
        settings: Settings,
        group: Group,
        device: torch.device,
        fully: bool,
        columns: int,
        tokens: int,
        rank: int,
        adapters: int,
    ):
        self.fully, self.columns, self.tokens = fully, columns, tokens
        self.rank, self.adapters = rank, adapters
        self.settings, self.group = settings, group
        shape = dict(geometry("llama-3.1-8b").config, hidden_size=columns, intermediate_size=256)
        tensors = KernelSet(shape, "down", ["down_proj"], adapters, rank, str(device))
        self.work = tensors.work(tokens, adapters, in_product=True)
        share = columns // group.size
        self.own = slice(group.rank * share, (group.rank + 1) * share) if fully else slice(columns)
        b = tensors.site.b[:, self.own].contiguous()  # [R, N] or [R, N / ranks]
        affine = tensors.site.affine[..., self.own].contiguous()
        self.site = replace(tensors.site, b=b, slice_starts=(0, b.shape[1]), affine=affine)
        width = columns + adapters * rank
        self.z = torch.randn(tokens, width, device=device).bfloat16()  # [T, N + W]

    def one_after_the_other(self, site: LoRASite) -> None:
        h = self.z[:, self.columns :].unsqueeze(0)  # [1, T, W]
        if self.fully:
            h = self.group.sum_parts(h).unsqueeze(0)
        else:
            self.group.all_reduce(self.z)
        lora_expand(self.z[:, self.own], Expand(site, h, self.work))
        if self.fully:
            self.group.all_reduce(self.z)

    def microseconds(self, call: Callable[[LoRASite], object]) -> float:
        site, calls = self.site, range(self.settings.calls)
        turns = itertools.cycle([replace(site, b=site.b.clone()) for _ in calls])
        return microseconds(self.settings, self.group, lambda: call(next(turns)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python bench/deltas.py")
    parser.add_argument("--columns", type=int, nargs="+", default=list(COLUMNS))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument(
        "--adapters",
        type=_pair,
        nargs="+",
        default=[_pair(text) for text in ADAPTERS],
        metavar="R:N",
        help="N adapters of rank R",
    )
    return sit(parser, argv, "deltas", rows, Row, _cases)


def _pair(text: str) -> tuple[int, int]:
    rank, adapters = text.split(":")
    return int(rank), int(adapters)


def _cases(options: argparse.Namespace, ranks: int) -> Cases:
    return Cases(
        ranks,
        options.device,
        columns=tuple(options.columns),
        tokens=tuple(options.tokens),
        adapters=tuple(options.adapters),
    )


if __name__ == "__main__":
    raise SystemExit(main())
