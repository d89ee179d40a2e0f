"""What one rank reads of a checkpoint and holds of an adapter, in elements: its part and no more."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux.adapters.peft import read_adapter
from loramux.adapters.shards import cut_adapter, dealt_rows
from loramux.adapters.weights import AdapterWeights
from loramux.config import EngineConfig, LoRAConfig
from loramux.models import fill
from loramux.models.loader import _on_meta, load_schema, read_config
from loramux.models.shards import Shards, cut_model
from loramux.parallel import PlannedGroup
from tiny import TinyWorld, save_adapter


def _cut(config: EngineConfig, rank: int, size: int) -> tuple[Any, Shards]:
    model = _on_meta(config, read_config(config.model, None))
    return model, cut_model(model, PlannedGroup(rank, size), config.lora)


class _Seen:
    """A safetensors file that counts the elements it gives, by tensor, and gives slices only."""

    def __init__(self, file: Any, given: Counter[str]):
        self._file, self._given = file, given

    def keys(self) -> Any:
        return self._file.keys()

    def get_slice(self, key: str) -> Any:
        inner, given = self._file.get_slice(key), self._given

        class Slice:
            def get_shape(self) -> list[int]:
                return list(inner.get_shape())

            def __getitem__(self, index: Any) -> torch.Tensor:
                tensor = inner[index]
                given[key] += tensor.numel()
                return tensor

        return Slice()


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_reads_its_slices_and_no_more(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    given: Counter[str] = Counter()
    opened = fill.safe_open
    monkeypatch.setattr(fill, "safe_open", lambda *a, **k: _Seen(opened(*a, **k), given))
    config = EngineConfig(model=str(tiny_world.model), device="cpu")
    whole = {name: p.numel() for name, p in _cut(config, 0, 1)[0].named_parameters()}
    for rank in range(size):
        given.clear()
        model, shards = _cut(config, rank, size)
        fill.materialise(model, "cpu")
        fill.fill_from_checkpoint(model, shards, config)
        held = {name.replace(".inner.", "."): p.numel() for name, p in model.named_parameters()}
        assert dict(given) == held
        for name, count in held.items():
            shared = "norm" in name
            # Two KV heads on four ranks are each on two.
            share = 2 if ("k_proj" in name or "v_proj" in name) else size
            assert count == (whole[name] if shared else whole[name] // share), name


def _bytes(weights: AdapterWeights) -> dict[str, tuple[int, int]]:
    """Of A and B of each module."""
    pairs = weights.layout.pairs
    return {name: (pair.a.num_bytes, pair.b.num_bytes) for name, pair in pairs.items()}


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_its_share_of_both_factors(
    tiny_world: TinyWorld, tmp_path: Path, size: int
) -> None:
    """With an r that the ranks do not divide, `fully_sharded_loras`."""
    r = 7
    path = save_adapter(tiny_world.model, tmp_path / "odd", r=r)
    lora = LoRAConfig(max_lora_rank=r, fully_sharded_loras=True)
    config = EngineConfig(model=str(tiny_world.model), lora=lora)
    schema = load_schema(config).schema
    weights, _ = read_adapter("odd", str(path), schema, lora, torch.float32)
    whole = _bytes(weights)
    assert sum(a for a, _ in whole.values()) == 4 * r * sum(
        module.in_features for module in schema.modules.values()
    )
    a_of, b_of = Counter[str](), Counter[str]()
    for rank in range(size):
        cuts = _cut(config, rank, size)[1].cuts
        own, dealt = _bytes(cut_adapter(weights, cuts)), _bytes(dealt_rows(weights, cuts, rank))
        for name, (a, b) in own.items():
            dealt_a, dealt_b = dealt.get(name, (0, 0))
            assert dealt_b == 0 and not (a and dealt_a)
            rows = len(range(rank, r, size))  # of A, where its rows are dealt out
            assert a + dealt_a == whole[name][0] * rows // r or a == whole[name][0] // size
            share = 2 if ("k_proj" in name or "v_proj" in name) else size
            assert b == whole[name][1] // share, name
            a_of[name] += a + dealt_a
            b_of[name] += b
    assert dict(a_of) == {name: a for name, (a, _) in whole.items()}
    assert all(b_of[name] >= b for name, (_, b) in whole.items())
