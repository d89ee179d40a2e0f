"""A fused step keeps no more alive at once than the memory plan says."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loramux.config import EngineConfig
from loramux.config.memory import _layer_bytes
from loramux.models import proof
from loramux.models.loader import load_model
from tiny import VOCAB, save_model

TOKENS = 16


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that were made inside and are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is(t)}
        result = op(*args, **(kwargs or {}))
        for tensor in filter(_is, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in before | self._known:
                self._born(storage)
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._died, key, size)

    def _died(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _is(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


# Not Gemma: what it computes in one kernel on a GPU has temporaries on a CPU.
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_the_largest_step_is_no_larger_than_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 512}
    model = save_model(tmp_path / "model", family, **wide)
    loaded = load_model(EngineConfig(model=str(model), device="cpu"))
    attached, decoder = loaded.attached, loaded.attached.decoder
    assert decoder is not None
    monkeypatch.setattr(proof, "BLOCK", TOKENS)
    ids = torch.randint(VOCAB, (TOKENS,))
    step = proof.small_step(attached, 0, TOKENS)
    with torch.inference_mode(), proof.small_cache(attached), step, Alive() as alive:
        decoder.forward(ids, torch.tensor([TOKENS - 1]))
    planned = _layer_bytes(TOKENS, None, loaded.facts)
    assert 0.9 * planned <= alive.peak <= planned
