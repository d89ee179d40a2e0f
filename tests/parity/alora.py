"""What PEFT answers under activated LoRA, in sums too: each adapter with the offset that PEFT finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from peft.tuners.lora.variants import ALoraLinearVariant, calculate_alora_offsets

from parity.oracle import Composition, Oracle


class ActivatedOracle(Oracle):
    """PEFT, uncached. The prompt decides where an adapter begins, as in PEFT's `generate`."""

    def offsets(self, prompt: Sequence[int], composition: Composition, more: int) -> dict[str, Any]:
        """By adapter, how many of the last tokens of `prompt` and `more` tokens it applies to."""
        ids, found = torch.tensor([list(prompt)]), {}
        for name in composition:
            (offset,) = calculate_alora_offsets(self.peft.peft_config, name, ids)
            found[name] = None if offset is None else offset + more
        return found

    def logits_behind(
        self, prompt: Sequence[int], answer: Sequence[int], composition: Composition
    ) -> torch.Tensor:
        """[T, V] of prompt and answer."""
        offsets = self.offsets(prompt, composition, len(answer))
        applied = ALoraLinearVariant.forward

        def forward(module, active_adapter, x, result, **_):
            own = [offsets[active_adapter]]
            return applied(module, active_adapter, x, result, alora_offsets=own)

        with mock.patch.object(ALoraLinearVariant, "forward", staticmethod(forward)):
            return self.logits([*prompt, *answer], composition)

    def greedy(self, prompt: Sequence[int], composition: Composition, count: int) -> list[int]:
        answer: list[int] = []
        for _ in range(count):
            logits = self.logits_behind(prompt, answer, composition)  # [T, V]
            answer.append(int(logits[-1].argmax()))
        return answer

    def generated(self, prompt: Sequence[int], name: str, count: int) -> list[int]:
        """By PEFT's own `generate`, with its cache."""
        assert self.peft is not None
        self.peft.set_adapter(name)
        for (module, adapter), value in self._scales.items():
            module.scaling[adapter] = value
        ids = torch.tensor([list(prompt)])
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        with torch.no_grad():
            out = self.peft.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                eos_token_id=None,
                pad_token_id=0,
                **settings,
            )
        return out[0, len(prompt) :].tolist()
