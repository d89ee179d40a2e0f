"""How large FlashInfer's workspaces have to be."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT_WORKSPACE = 128 << 20  # what FlashInfer's documentation recommends
BLOCKS_PER_SM = 2  # its tensor-core kernels are planned for so many blocks on each processor
TENSOR_CORE_GROUP = 4  # query heads per KV head from which tensor cores decode faster


@dataclass(frozen=True, slots=True)
class Shape:
    """What the sizes of the workspaces depend on."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_batch: int
    """The most sequences whose work may be cut into pieces."""

    max_rows: int
    """The largest captured step; larger ones than `max_batch` are not cut, they are pieces enough."""

    num_sms: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def tensor_cores(self) -> bool:
        """Whether decode runs on them; small groups would leave most of their rows empty."""
        return self.group >= TENSOR_CORE_GROUP

    def float_bytes(self) -> int:
        """Partial results of pieces: a captured decode step reserves one for every tile."""
        pieces = BLOCKS_PER_SM * self.num_sms // self.num_kv_heads
        widest = 128 if self.head_dim < 256 else 64  # rows of the largest tile
        tile = 16 if self.group <= 16 else 64 if self.group <= 64 else widest
        tiles = -(-self.max_batch * self.group // tile) + self.max_batch
        decode, prefill = max(pieces, tiles) * tile, pieces * widest
        # Decode without tensor cores: a piece per resident block, at most 32 of them on a processor.
        plain = 32 * self.num_sms // self.num_kv_heads + max(self.max_batch, self.max_rows)
        rows = max(decode, prefill, plain)
        return max(FLOAT_WORKSPACE, rows * self.num_heads * (self.head_dim + 1) * 4 + 4096)

    def decode_bytes(self) -> int:
        """Lists of a decode plan: 13 bytes a tile and 8 a sequence, less than this."""
        return (64 << 10) + 16 * 32 * self.num_sms + 64 * max(self.max_batch, self.max_rows)

    def prefill_bytes(self, batch_size: int, rows: int) -> int:
        """Lists of a prefill plan: FA3 has 7 words per tile of 128 rows and head, FA2 a word per
        row and 13 bytes per tile of 16 packed rows."""
        fa3 = (-(-rows // 128) + batch_size) * self.num_heads * 28
        fa2 = (rows * self.group // 16 + batch_size + BLOCKS_PER_SM * self.num_sms) * 16 + rows * 8
        return max(fa3, fa2) + (64 << 10) + 16 * batch_size


def workspace_bytes(shape: Shape, kinds: int) -> int:
    """Device memory that a planner takes before its first prefill."""
    return shape.float_bytes() + kinds * shape.decode_bytes()
