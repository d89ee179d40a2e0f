"""Adapters that change the vocabulary among captured decodes, in bfloat16: their bodies are replayed,
longer prompts launched, and the logits of all are PEFT's in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu.mixtures import LAYERS, MODEL_FACTOR, SHAPE, prompts, round_weights, row_errors
from gpu.mixtures import VOCAB as SIZE
from gpu.replaying import DEVICES, use_seen_runner
from loramux import LLM, SamplingParams
from parity.vocabularies import VocabularyOracle, save_vocabulary
from tiny import save_model
from together import answered_together

WIDE = SIZE + 5
BOTH = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
FEATURES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": BOTH},
    "tokens": {"trainable_token_indices": {"embed_tokens": [5, 9, 77], "lm_head": [3, 9]}},
    "copies": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "added": {"resize": WIDE, "target_modules": BOTH},
    "plain": {},
}
MOST_ERROR = 0.06  # of a row of logits: what bfloat16 strays by, see tests/gpu/mixtures.py


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("device", DEVICES)
def test_logits_and_replays(
    tmp_path, device: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {} if family == "llama" else {"layer_types": ["full_attention"] * LAYERS}
    model = save_model(tmp_path / "model", family, **SHAPE, **more)
    round_weights(model, MODEL_FACTOR)
    adapters = {
        name: save_vocabulary(model, tmp_path / name, seed, strength=0.04, **settings)
        for seed, (name, settings) in enumerate(FEATURES.items())
    }
    for folder in adapters.values():
        round_weights(folder, 1.0)
    use_seen_runner(monkeypatch, device)
    settings = {"dtype": "bfloat16", "max_num_seqs": 16, "max_num_batched_tokens": 256}
    settings |= {"max_model_len": 1024, "kv_cache_memory_bytes": 32 << 20, "device": device}
    settings |= {"max_loras": 3, "async_scheduling": True, "cudagraph_capture_sizes": [4, 16, 64]}
    settings |= {"max_lora_vocabulary_rows": 16, "enable_vocabulary_lora": True}
    names = [None, *adapters, "lora", "added"]
    texts = prompts(len(names), seed=3, shortest=20, longest=120)
    texts[names.index("added")][4:4] = [SIZE, WIDE - 1]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(str(model), enable_lora=True, **settings) as llm:
        for name, folder in adapters.items():
            llm.engine.add_adapter(name, str(folder))
        requests = [
            (text, greedy, [name] if name else []) for name, text in zip(names, texts, strict=True)
        ]
        answers = answered_together(llm.engine, requests)
        runner = llm.engine.runner
        seen, events = list(runner.seen), list(runner.events)
    replayed = [event.key for event in events if event.kind == "replay"]
    assert sum(key.outer for key in replayed) > 8
    oracle = VocabularyOracle(model)
    for number, (name, text) in enumerate(zip(names, texts, strict=True)):
        size = WIDE if name == "added" else SIZE
        every = [*text, *answers[number].tokens]
        wanted = oracle.logits(adapters[name] if name else None, every[:-1], size)  # [T, V]
        mine = [one for one in seen if one.sequence == number]
        assert len(mine) == 12 and any(one.replayed for one in mine)
        for one in mine:
            got = one.logits.float().cpu()  # [columns]
            assert torch.isneginf(got[size:]).all()
            error = row_errors(got[None, :size], wanted[None, one.position - 1])
            assert float(error) < MOST_ERROR, (name, one.position)
