"""The final hidden states of a forward: behind the last norm, before the output head.

They are what transformers calls `last_hidden_state`, whichever forward the model runs by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from loramux.errors import EngineError
from loramux.models.attach import Attached


class HiddenRows:
    """Rows of a forward's final hidden states."""

    def __init__(self, rows: torch.Tensor):
        self._rows = rows
        self._found: torch.Tensor | None = None

    def keep(self, hidden: torch.Tensor) -> None:
        """Take them out of `hidden` [T, D]."""
        self._found = hidden[self._rows].float()  # [N, D]

    def keep_output(self, _: nn.Module, inputs: object, output: Any) -> None:
        """As a forward hook of a body, whose output begins with its states [1, T, D]."""
        self.keep(output[0][0])

    @property
    def states(self) -> torch.Tensor:
        """[N, D] float32. Raises EngineError when the forward did not go through a body that we know."""
        if self._found is None:
            raise EngineError("this model's hidden states cannot be had")
        return self._found


@contextmanager
def kept_hidden(attached: Attached, rows: torch.Tensor) -> Iterator[HiddenRows]:
    """While it is open, a forward leaves the hidden states of its tokens `rows` [N] int64."""
    found = HiddenRows(rows)
    with ExitStack() as stack:
        if (decoder := attached.decoder) is not None:
            decoder.tap = found.keep
            stack.callback(setattr, decoder, "tap", None)
        else:
            # Some models run the decoder in their body without the body itself. What ends last counts.
            model = attached.model
            for body in {id(b): b for b in (model.base_model, model.get_decoder())}.values():
                if body is not model:
                    stack.callback(body.register_forward_hook(found.keep_output).remove)
        yield found


@torch.inference_mode()
def check_hidden(attached: Attached) -> str | None:
    """Why final hidden states of `attached` cannot be had; None: they can. All ranks call it together.

    Three tokens are run without a cache. A fused decoder always has them."""
    if attached.decoder is not None:
        return None
    device, model = attached.device, attached.model
    ids = torch.zeros(1, 3, dtype=torch.long, device=device)  # [1, 3]
    positions = torch.arange(3, device=device).unsqueeze(0)  # [1, 3]
    with kept_hidden(attached, torch.tensor([2], device=device)) as found:
        model(input_ids=ids, position_ids=positions, use_cache=False)
    try:
        width = found.states.shape[-1]
    except EngineError as error:
        return str(error)
    if width != attached.schema.hidden_size:
        return f"this model's hidden states have {width} features at its end"
    return None
