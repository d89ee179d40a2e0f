"""The KV cache in integers: blocks, who shares them, and which prefixes they hold. Torch-free.

    block      `block_size` consecutive positions of one sequence
    chain key  SHA-256 over (key of the block before, its tokens, the media in them); the first link
               is the composition, so that blocks written under one adapter version are never read
               under another. Adapters that begin to apply later, as activated LoRA does, are a link of
               their own before the first block that they touch: blocks before it are those of the
               sequences that have the same tokens and adapters so far

A block whose last user is gone keeps its content, and its key, until it is needed for something
else; the least recently freed goes first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from loramux.types import Composition


def chain_root(composition: Composition) -> bytes:
    """First link of the chain: digests and scales."""
    return hashlib.sha256(repr(composition).encode()).digest()


def chain_join(previous: bytes, joining: Sequence[tuple[str, float, int]]) -> bytes:
    """Link before a block within which adapters begin to apply: digests, scales and first tokens."""
    return hashlib.sha256(previous + repr(joining).encode()).digest()


def chain_key(previous: bytes, token_ids: Sequence[int], media: bytes = b"") -> bytes:
    """Key of a full block after `previous`; `media` says what stands in it beside tokens."""
    return hashlib.sha256(previous + array("q", token_ids).tobytes() + media).digest()


class BlockPool:
    """Reference counts and prefix keys of `num_blocks` blocks."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.queries = 0  # tokens looked up
        self.hits = 0  # tokens found
        self._users = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # Free blocks, the first to be taken first; values unused.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks of the longest known prefix of the chain; takes none of them."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_beside(self, blocks: Sequence[int]) -> int:
        """How many blocks would stay free if `blocks` were taken."""
        return len(self._free) - sum(1 for block in blocks if self._users[block] == 0)

    def share(self, blocks: Sequence[int]) -> None:
        """Add a user to blocks that `match` found."""
        for block in blocks:
            if self._users[block] == 0:
                del self._free[block]
            self._users[block] += 1

    def take(self, count: int) -> list[int] | None:
        """`count` fresh blocks, whose old content is forgotten; None if there are not so many."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._users[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a user. The tail of a sequence is freed first, so its prefix is kept longest."""
        for block in reversed(blocks):
            self._users[block] -= 1
            assert self._users[block] >= 0, "a block was freed twice. This is a bug."
            if self._users[block] == 0:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)  # nothing to keep: take it first

    def remember(self, block: int, key: bytes) -> None:
        """`block` is full and computed and holds the prefix `key`."""
        if self.enable_prefix_caching and key not in self._block_of and block not in self._key_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def check_integrity(self) -> None:
        """No block is in use, none is lost, and keys and blocks agree."""
        assert not any(self._users), "blocks leaked"
        assert len(self._free) == self.num_blocks, "a block is neither free nor used"
        assert self._block_of == {key: block for block, key in self._key_of.items()}

    def _forget(self, block: int) -> None:
        if (key := self._key_of.pop(block, None)) is not None:
            del self._block_of[key]
