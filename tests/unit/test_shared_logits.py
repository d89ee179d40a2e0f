"""Captured steps leave their logits in one place, whatever their size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpu.replaying import CpuReplayingRunner, use_seen_runner
from loramux import LLM, SamplingParams
from loramux.models.layers import _head
from tiny import save_model

PROMPTS = [[5 + i, 9, 44, 102, 33] for i in range(3)]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def _tokens(model: Path, **settings: object) -> tuple[list[list[int]], LLM]:
    llm = LLM(str(model), device="cpu", max_num_seqs=4, kv_cache_memory="1MiB", **settings)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], GREEDY)
    return [output.outputs[0].token_ids for output in outputs], llm


@pytest.mark.parametrize(
    ("family", "bent"), [("llama", {}), ("gemma3", {"final_logit_softcapping": 3.0})]
)
def test_graphs_of_many_rows_share_their_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, bent: dict[str, float]
) -> None:
    model = save_model(tmp_path / "model", family, **bent)
    expected, _ = _tokens(model)
    use_seen_runner(monkeypatch, "cpu")
    got, llm = _tokens(model)
    runner = llm.engine.runner
    assert got == expected
    assert isinstance(runner, CpuReplayingRunner) and runner.decoder is not None
    assert runner.decoder.softcap == bent.get("final_logit_softcapping", 0.0)
    assert runner._graphs is not None
    graphs = runner._graphs._graphs
    assert {key.tokens for key in graphs} >= {1, 2, 4, 16, 128}
    places = {captured.output.logits.data_ptr() for k, captured in graphs.items() if k.tokens > 1}
    assert len(places) == 1
    rows = [captured.output.logits.shape[0] for captured in graphs.values()]
    assert sorted(rows) == sorted(min(key.tokens, 4) for key in graphs)


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_writes_where_it_is_told(bias: bool) -> None:
    head = torch.nn.Linear(8, 40, bias=bias).requires_grad_(False)
    x, out = torch.randn(3, 8), torch.full((3, 40), torch.nan)
    got = _head(head, x, out)
    assert got.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, _head(head, x, None))
