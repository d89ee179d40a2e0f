"""One answer in the making. A request with n answers is n sequences. Torch-free."""

from __future__ import annotations

import random
import sys
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loramux.engine.activation import composed, until_second
from loramux.engine.blocks import BlockPool, chain_join, chain_key, chain_root
from loramux.engine.media_spans import content_key, in_order
from loramux.types import AdapterRef, Composition, FinishReason, MediaItem, Request

if TYPE_CHECKING:
    from loramux.engine.fair_share import Group


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, blocks and places of one answer.

    There is no prefill phase and no decode phase: `num_computed` tokens have their keys and values
    in the cache, and the rest of `tokens` has to get there.

    A launched step counts as computed, for what is launched later comes after it. Tokens that it
    chooses are *pending* until its result has been read: they have a place and no value yet.
    """

    sequence_id: int
    request: Request
    index: int
    seed: int
    queued_at: float
    stop_ids: tuple[int, ...] = ()  # tokens that end this answer
    elder: Sequence | None = None  # the first answer of the request, whose prompt blocks are shared
    tokens: list[int] = field(default_factory=list)
    num_prompt: int = 0
    num_computed: int = 0
    num_pending: int = 0
    max_length: int = 0  # prompt and answer never become longer
    num_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # chain keys of the full blocks of `tokens`
    held: tuple[str, ...] = ()  # digests held in the adapter pool
    composition: Composition = ()  # those that begin first in front
    starts: tuple[int, ...] = ()  # of each, the token from which it applies
    last_start: int = 0
    digests: tuple[str, ...] = ()
    members: tuple[tuple[int, float], ...] = ()  # while it runs: first pool row, scale
    refs: dict[str, AdapterRef] = field(default_factory=dict)
    items: tuple[MediaItem, ...] = ()  # in the order in which they stand in the prompt
    shift: int = 0  # what tokens behind the prompt add to their index, to have their position
    finish_reason: FinishReason | None = None
    admitted_once: bool = False
    num_output_at_admission: int = 0
    admitted_at: float = 0.0
    group: Group | None = None  # from when it is queued first
    charged: int = 0  # tokens that its tenants were charged
    given_way: int = 0  # how often it was put back for another tenant
    _table: tuple[int, ...] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.max_length = self.num_prompt + (self.request.params.max_tokens or sys.maxsize)
        if self.elder is not None:
            self.composition, self.starts = self.elder.composition, self.elder.starts
        else:
            self.composition, self.starts = composed(self.request)
        self.last_start = self.starts[-1] if self.starts else 0
        self.digests = tuple(digest for digest, _ in self.composition)
        self.refs = {ref.digest: ref for ref, _ in self.request.adapters}
        if (media := self.request.media) is not None:
            self.items, self.shift = in_order(media.items), media.shift

    @property
    def encoder_composition(self) -> Composition:
        """Its adapters that touch the model's encoder."""
        return tuple(m for m in self.composition if self.refs[m[0]].adapts_encoder)

    @property
    def pools(self) -> bool:
        """Whether nothing is generated: it ends with its prompt."""
        return self.request.pooling is not None

    @property
    def num_tokens(self) -> int:
        """Tokens whose values are known."""
        return len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens, pending ones included."""
        return len(self.tokens) + self.num_pending

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def has_advanced(self) -> bool:
        """Whether it has chosen a token since it was last admitted."""
        return self.num_output + self.num_pending > self.num_output_at_admission

    @property
    def ends_with_pending(self) -> bool:
        """Whether the token on its way is the last one, whatever it is."""
        return self.num_pending > 0 and self.length >= self.max_length

    @property
    def prompt_can_be_shared(self) -> bool:
        """Whether others find its prompt in the prefix cache, or need not wait for that."""
        return self.num_output > 0 or self.finish_reason is not None

    @property
    def block_table(self) -> tuple[int, ...]:
        """`blocks`, frozen: a step asks for it, and it changes once in `block_size` steps."""
        if self._table is None:
            self._table = tuple(self.blocks)
        return self._table

    def set_blocks(self, blocks: list[int]) -> None:
        self.blocks, self._table = blocks, None

    def update_keys(self, block_size: int) -> None:
        """Extend the chain to every full block of `tokens`."""
        while (len(self.keys) + 1) * block_size <= len(self.tokens):
            start = len(self.keys) * block_size
            end = start + block_size
            previous = self.keys[-1] if self.keys else chain_root(self._from_the_first())
            if self.last_start >= start and (joining := self._beginning(max(1, start), end)):
                previous = chain_join(previous, joining)
            media = content_key(self.items, start, end) if self.items else b""
            self.keys.append(chain_key(previous, self.tokens[start:end], media))

    def _from_the_first(self) -> Composition:
        """Its adapters that apply from the first token on."""
        return self.composition[: bisect_left(self.starts, 1)]

    def _beginning(self, start: int, stop: int) -> tuple[tuple[str, float, int], ...]:
        """(digest, scale, first token) of the adapters that begin to apply at tokens [start, stop)."""
        found = range(bisect_left(self.starts, start), bisect_left(self.starts, stop))
        return tuple((*self.composition[i], self.starts[i]) for i in found)

    def in_one_row(self, start: int, count: int) -> int:
        """How many of the `count` tokens from `start` on a row may have, see `until_second`."""
        return until_second(self.starts, start, count) if self.last_start > start else count

    def cached_prefix(self, pool: BlockPool) -> list[int]:
        """Blocks of the prefix that is in the cache, leaving at least one token to compute."""
        if not pool.enable_prefix_caching:
            return []
        self.update_keys(pool.block_size)
        usable = (len(self.tokens) - 1) // pool.block_size
        return pool.match(self.keys[:usable])


def answers_of(request: Request, seeds: random.Random, ids: Iterator[int]) -> list[Sequence]:
    """The n answers of a request, which brings a seed or is given one."""
    seed = request.params.seed
    base = seeds.getrandbits(48) if seed is None else seed
    answers: list[Sequence] = []
    for index in range(request.params.n):
        answers.append(
            Sequence(
                sequence_id=next(ids),
                request=request,
                index=index,
                seed=base + index,
                queued_at=request.arrival_s,
                elder=answers[0] if answers else None,
            )
        )
    return answers
