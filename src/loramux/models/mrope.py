"""Rotary embeddings whose tokens have three positions: in time, in height and in width (M-RoPE).

Each angle turns with one of the three. The kernels know one position a token, a row of a table: a token
whose three positions are equal takes that position's row, any other a row of its own, put together from
those of its three positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True, eq=False)
class MRope:
    """Which of a token's three positions each angle turns with."""

    sections: torch.Tensor
    """[rot] int64 in 0..2: of each column of a table, cos first, then sin."""

    @classmethod
    def of(cls, rotary: nn.Module, device: torch.device) -> MRope | None:
        """What a rotary embedding of transformers does; None where it takes one position a token.

        It is asked, not its configuration: Qwen3-VL's angles take turns and those of Qwen2-VL,
        Qwen2.5-VL and Qwen2.5-Omni do not, and that stands in the code alone. Raises ValueError if an
        angle turns with none of the three positions or with several."""
        if not has_sections(rotary):
            return None
        like = torch.zeros(1, 1, device=device)
        positions = torch.eye(3, dtype=torch.long, device=device).unsqueeze(1)  # [3, 1, 3]
        with torch.inference_mode(False), torch.no_grad():
            _, sin = rotary(like, positions)  # [1, 3, 2 rot / 2], each angle twice
        turned = sin[0, :, : sin.shape[-1] // 2] != 0  # [3, rot / 2]
        if not bool((turned.sum(0) == 1).all()):
            raise ValueError("angles of its rotary embedding do not turn with one position each")
        section = turned.long().argmax(0)  # [rot / 2]
        return cls(torch.cat((section, section)))  # [rot]

    def gather(self, table: torch.Tensor, positions: torch.Tensor, first_row: int) -> None:
        """Write the rows of tokens at `positions` [3, T] int64 into `table` [rows, rot] from `first_row`
        on; their angles are found in the rows before."""
        source = positions.index_select(0, self.sections).t()  # [T, rot]
        rows = table[first_row : first_row + source.shape[0]]  # [T, rot]
        torch.gather(table[:first_row], 0, source, out=rows)


def has_sections(rotary: nn.Module) -> bool:
    """Whether a rotary embedding of transformers wants three positions a token."""
    return hasattr(rotary, "mrope_section")
