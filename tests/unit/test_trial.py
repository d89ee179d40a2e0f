"""Captured steps with prompts are tried at start, and left out where they compute something else."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu.replaying import CpuReplayingRunner, use_seen_runner
from loramux import LLM, SamplingParams
from loramux.engine.graphs import GraphKey, StepGraphs, StepOutput
from tiny import save_model

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": [5 + i, 9, 44, 102, 33]} for i in range(3)]


@pytest.fixture
def llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    use_seen_runner(monkeypatch, "cpu")
    model = save_model(tmp_path / "model")
    settings: dict[str, Any] = {"cudagraph_capture_sizes": [1, 4, 8, 48, 64], "max_num_seqs": 8}
    # Every prompt is computed each time.
    settings |= {"kv_cache_memory": "1MiB", "enable_prefix_caching": False}
    with LLM(str(model), device="cpu", dtype="float32", **settings) as llm:
        yield llm


def _runner(llm: LLM) -> CpuReplayingRunner:
    runner: Any = llm.engine.runner
    return runner


def _replayed(llm: LLM) -> set[int]:
    """Tokens of the graphs that prompts were replayed with."""
    before = len(_runner(llm).events)
    llm.generate(PROMPTS, GREEDY)
    events = _runner(llm).events[before:]
    return {e.key.tokens for e in events if e.key is not None and e.tokens > e.rows}


def test_right_graphs_stay(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _runner(llm).try_prompts()
    assert not caplog.records
    assert _replayed(llm) == {48}
    llm.engine.check_integrity()


@pytest.mark.parametrize("wrong", ["logits", "NaN", "an error"])
def test_wrong_graphs_go(llm: LLM, caplog: pytest.LogCaptureFixture, wrong: str) -> None:
    expected = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)]
    runner = _runner(llm)
    assert runner._graphs is not None
    key = GraphKey(64).keeping(8)
    captured = runner._graphs._graphs[key]

    class Broken:
        def replay(self) -> None:
            if wrong == "an error":
                raise RuntimeError("an illegal something")
            logits = captured.output.logits
            logits.copy_(torch.randn_like(logits) if wrong == "logits" else logits * torch.nan)

        def reset(self) -> None: ...

    broken: Any = Broken()
    runner._graphs._graphs[key] = dataclasses.replace(captured, graph=broken)
    runner.try_prompts()
    assert "[64]" in caplog.text and runner._graphs.sizes == [1, 4, 8]
    assert _replayed(llm) == set(), "prompts are launched"
    assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)] == expected


def test_a_size_that_cannot_be_captured_is_left_out() -> None:
    def forward(key: GraphKey) -> StepOutput:
        raise RuntimeError(f"no {key.tokens}")

    class Graphs(StepGraphs):
        def capture(self, key: GraphKey) -> Any:
            return self._forward(key)

    graphs = Graphs([4, 64], lambda key: None, forward)
    graphs.capture_all([GraphKey(64).keeping(4), GraphKey(64, True).keeping(4)])
    assert graphs.sizes == [4]
    with pytest.raises(RuntimeError, match="no 4"):
        graphs.capture_all([GraphKey(4).keeping(4)])
    graphs = Graphs([4, 64], lambda key: None, forward)
    with pytest.raises(RuntimeError, match="no 64"):  # the other ranks may have captured it
        graphs.capture_all([GraphKey(64).keeping(4)], alone=False)


def test_a_chunk_that_samples_nothing_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(save_model(tmp_path / "model"))
    prompts = [{"prompt_token_ids": [5 + i for i in range(45)]}, *PROMPTS[:1]]
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache_memory": "1MiB"}
    settings |= {"max_num_batched_tokens": 16, "max_num_seqs": 4}
    with LLM(model, **settings) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)]
    use_seen_runner(monkeypatch, "cpu")
    with LLM(model, cudagraph_capture_sizes=[4, 16], **settings) as llm:
        assert [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)] == expected
        events = _runner(llm).events
    assert {event.kind for event in events} == {"replay"}
    assert any(event.rows == 1 and event.tokens == 16 for event in events)
