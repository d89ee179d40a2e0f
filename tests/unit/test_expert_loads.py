"""Adapters on experts reach the pool by the kernel that GPUs use as they do by the copies of a CPU, out
of every layout that files have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loramux import LLM
from loramux.adapters.peft import read_adapter
from loramux.engine.plan import AdapterLoad
from loramux.kernels import LoRASite
from parity.moe import make_adapter, save_moe

loader = pytest.importorskip("loramux.engine.device_loader")
scatter = pytest.importorskip("loramux.kernels.triton_scatter")

FIRST_ROW = 3
SETTINGS = {"device": "cpu", "max_model_len": 64, "kv_cache_memory_bytes": 8 << 20}
CASES = [
    ("qwen3_moe", "per_expert", True),
    ("qwen3_moe", "fused", True),
    ("qwen3_moe", "outer", True),
    ("gpt_oss", "fused", True),  # alternating rows, cut in two
    ("gpt_oss", "fused", False),  # alternating rows of one matrix
]


def empty(site: LoRASite) -> LoRASite:
    fresh = {name: torch.zeros_like(getattr(site, name)) for name in ("a", "b", "row_scale")}
    return replace(site, **fresh, row_r=torch.full_like(site.row_r, 5))


@pytest.mark.parametrize(("family", "layout", "mixed"), CASES)
def test_a_load_writes_what_the_copies_write(
    tmp_path: Path, family: str, layout: str, mixed: bool
) -> None:
    model = save_moe(tmp_path / "model", family, num_hidden_layers=1)
    skipped = (1,) if layout == "per_expert" else ()
    made = make_adapter(model, tmp_path / "a", layout, seed=1, r=6, skipped=skipped)
    settings = {**SETTINGS, "enable_mixed_moe_lora_format": mixed}
    with LLM(str(model), enable_lora=True, **settings) as llm:
        runner, config = llm.engine.runner, llm.engine.config
        schema = runner.attached.schema
        assert config.lora is not None
        weights, _ = read_adapter("a", made.path, schema, config.lora, torch.float32)
        runner.load(AdapterLoad(weights.ref, FIRST_ROW), weights)
        wanted = runner._sites[len(runner.attached.sites) :]
    ours = [empty(site) for site in wanted]
    sources = {
        (
            schema.modules[name].site - len(runner.attached.sites),
            schema.modules[name].slice_index,
        ): (loader._expert_source(stored))
        for name, stored in weights.layout.experts.items()
    }
    assert len(sources) == sum(site.num_slices for site in wanted)
    max_r = weights.ref.max_r
    work = scatter.ScatterTable(ours).fill(sources, weights.buffer.data_ptr(), FIRST_ROW, max_r)
    scatter.scatter(work, work.table)
    twins = [empty(site) for site in wanted]
    scatter.scatter_reference(twins, weights.buffer, sources, FIRST_ROW, max_r)
    for site, mine, twin in zip(wanted, ours, twins, strict=True):
        rows = torch.arange(site.row_r.shape[1]) % (site.row_r.shape[1] // site.experts)
        own = (rows >= FIRST_ROW) & (rows < FIRST_ROW + max_r)  # of each expert
        assert bool(site.a.any()) and bool(site.b.any())
        for other in (mine, twin):
            assert torch.equal(other.a, site.a) and torch.equal(other.b, site.b)
            assert torch.equal(other.row_r[:, own], site.row_r[:, own])
            assert torch.equal(other.row_scale[:, own], site.row_scale[:, own])
            assert bool((other.row_r[:, ~own] == 5).all())  # neighbours keep theirs
