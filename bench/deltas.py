"""Sums over GPUs with the LoRA delta behind them, as one kernel and as two: python bench/deltas.py

A row layer's products and shrunk activations [tokens, columns + adapters * r] of all ranks are summed,
and the delta is added: by an exchange and an expand, and by `kernels.triton_sum_expand`, which takes
some of the cases. Every call of a graph has adapters of its own, so that they come from memory.
Microseconds of one call, as the median of many replays of a graph that has several.
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
ADAPTERS = ("16:1", "16:8", "16:16", "16:32", "64:1", "64:2", "64:8")


@dataclass(frozen=True, slots=True)
class Cases(Settings):
    """`adapters`: r and how many."""

    columns: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    adapters: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """None: as one kernel there is none for such a step."""

    columns: int
    tokens: int
    rank: int
    adapters: int
    sum_us: float
    sum_then_expand_us: float
    as_one_us: float | None
    taken: bool
    """Whether a layer would have it as one."""


def rows(cases: Cases, group: Group, device: torch.device) -> Iterator[Row]:
    for columns, (rank, adapters), tokens in itertools.product(
        cases.columns, cases.adapters, cases.tokens
    ):
        if adapters <= tokens:
            yield _row(_Case(cases, group, device, columns, tokens, rank, adapters))


def _row(case: _Case) -> Row:
    total = case.microseconds(lambda _: case.group.sum_parts(case.z.unsqueeze(0)))
    in_two = case.microseconds(case.sum_then_expand)
    exchange = case.group.exchange
    one, taken = None, False
    if exchange is not None and exchange.can_take_delta(case.z, case.site, case.work):
        one = case.microseconds(lambda site: exchange.sum_and_expand(case.z, site, case.work))
        taken = exchange.takes_delta(case.z, case.site, case.work)
    return Row(case.columns, case.tokens, case.rank, case.adapters, total, in_two, one, taken)


class _Case:
    """Sums are in place: with every call the numbers grow, to infinity before long."""

    def __init__(
        self,
        settings: Settings,
        group: Group,
        device: torch.device,
        columns: int,
        tokens: int,
        rank: int,
        adapters: int,
    ):
        self.columns, self.tokens, self.rank, self.adapters = columns, tokens, rank, adapters
        self.settings, self.group = settings, group
        shape = dict(geometry("llama-3.1-8b").config, hidden_size=columns, intermediate_size=256)
        tensors = KernelSet(shape, "down", ["down_proj"], adapters, rank, str(device))
        self.site, self.work = tensors.site, tensors.work(tokens, adapters, in_product=True)
        width = columns + adapters * rank
        self.z = torch.randn(tokens, width, device=device).bfloat16()  # [T, N + W]

    def sum_then_expand(self, site: LoRASite) -> None:
        self.group.sum_parts(self.z.unsqueeze(0))
        h = self.z[:, self.columns :].unsqueeze(0)  # [1, T, W]
        lora_expand(self.z[:, : self.columns], Expand(site, h, self.work))

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
