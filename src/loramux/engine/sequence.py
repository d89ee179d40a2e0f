"""One answer in the making. A request with n answers is n sequences. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

from loramux.engine.blocks import BlockPool, chain_key, chain_root
from loramux.types import AdapterRef, Composition, FinishReason, Request


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, blocks and places of one answer.

    There is no prefill phase and no decode phase: `num_computed` tokens have their keys and values
    in the cache, and the rest of `tokens` has to get there.
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
    num_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # chain keys of the full blocks of `tokens`
    held: list[str] = field(default_factory=list)  # digests held in the adapter pool
    composition: Composition = ()
    refs: dict[str, AdapterRef] = field(default_factory=dict)
    finish_reason: FinishReason | None = None
    admitted_once: bool = False
    num_output_at_admission: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.composition = self.request.composition
        self.refs = {ref.digest: ref for ref, _ in self.request.adapters}

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def has_advanced(self) -> bool:
        """Whether it has chosen a token since it was last admitted."""
        return self.num_output > self.num_output_at_admission

    @property
    def digests(self) -> list[str]:
        return [digest for digest, _ in self.composition]

    @property
    def prompt_is_computed(self) -> bool:
        return self.num_computed >= self.num_prompt or self.finish_reason is not None

    def update_keys(self, block_size: int) -> None:
        """Extend the chain to every full block of `tokens`."""
        while (len(self.keys) + 1) * block_size <= len(self.tokens):
            start = len(self.keys) * block_size
            previous = self.keys[-1] if self.keys else chain_root(self.composition)
            self.keys.append(chain_key(previous, self.tokens[start : start + block_size]))

    def cached_prefix(self, pool: BlockPool) -> list[int]:
        """Blocks of the prefix that is in the cache, leaving at least one token to compute."""
        if not pool.enable_prefix_caching:
            return []
        self.update_keys(pool.block_size)
        usable = (len(self.tokens) - 1) // pool.block_size
        return pool.match(self.keys[:usable])
