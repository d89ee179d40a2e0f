"""Pooled prompts among captured decodes, in bfloat16: their steps are launched, the others replayed, and
the values are PEFT's in float32."""

from __future__ import annotations

import pytest
import torch

from gpu.mixtures import ADAPTER_FACTOR, MODEL_FACTOR, SHAPE, prompts, round_weights
from gpu.replaying import DEVICES, use_seen_runner
from loramux import LLM, PoolingParams, SamplingParams
from loramux.types import AdapterUse
from parity.heads import peft_hidden, peft_logits, save_classifier
from tiny import save_model

LABELS = {"three": 3, "eight": 8}
MOST_ERROR = 0.06  # of a hidden state's length: what bfloat16 strays by, see tests/gpu/mixtures.py
EMBED = PoolingParams(normalize=False)
LOGITS = PoolingParams(task="classify", use_activation=False)
ASKED = [((), EMBED), (("three",), LOGITS), (("eight",), LOGITS), (("three",), EMBED)]


@pytest.mark.parametrize("device", DEVICES)
def test_values_and_replays(tmp_path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", "llama", **SHAPE)
    adapters = {
        name: save_classifier(model, tmp_path / name, count, seed=count, r=count)
        for name, count in LABELS.items()
    }
    for folder, factor in [
        (model, MODEL_FACTOR),
        *((f, ADAPTER_FACTOR) for f in adapters.values()),
    ]:
        round_weights(folder, factor)
    use_seen_runner(monkeypatch, device)
    settings = {"dtype": "bfloat16", "max_num_seqs": 16, "max_num_batched_tokens": 256}
    settings |= {"max_model_len": 1024, "kv_cache_memory_bytes": 32 << 20, "device": device}
    settings |= {"max_loras": 2, "async_scheduling": True, "cudagraph_capture_sizes": [4, 8, 64]}
    texts = prompts(len(ASKED), seed=3, shortest=20, longest=200)
    with LLM(str(model), enable_lora=True, **settings) as llm:
        for name, folder in adapters.items():
            llm.engine.add_adapter(name, str(folder))
        generate = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        for number, text in enumerate(prompts(3, seed=4)):
            llm.engine.submit(f"text-{number}", text, generate)
        for _ in range(6):
            llm.engine.step()
        for number, ((names, params), text) in enumerate(zip(ASKED, texts, strict=True)):
            llm.engine.submit(str(number), text, params, [AdapterUse(name) for name in names])
        values, tokens = {}, 0
        while llm.engine.has_requests:
            for delta in llm.engine.step():
                assert delta.error is None
                tokens += len(delta.token_ids)
                if delta.pooled is not None:
                    values[delta.request_id] = torch.tensor(delta.pooled.values.tolist())
        runner = llm.engine.runner
        kinds = [event.kind for event in runner.events]
        assert kinds.count("replay") > 12 and kinds.count("eager") >= 1 and tokens > 40
        llm.engine.check_integrity()
    for number, ((names, params), text) in enumerate(zip(ASKED, texts, strict=True)):
        path = adapters[names[0]] if names else None
        hidden = peft_hidden(model, path, text, LABELS[names[0]] if names else 2)  # [D]
        got = values[str(number)]
        if params is EMBED:
            assert float((got - hidden).norm() / hidden.norm()) < MOST_ERROR
            continue
        wanted = peft_logits(model, [adapters[names[0]]], LABELS[names[0]], text)  # [labels]
        assert got.shape == wanted.shape
        assert float((got - wanted).norm() / wanted.norm()) < 2 * MOST_ERROR
