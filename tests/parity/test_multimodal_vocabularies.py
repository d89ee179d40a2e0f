"""LoRA on the embedding and the head of the language model inside a multimodal one, and trained tokens
there, against PEFT: with images and sound in the prompts, and base rows beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from parity.multimodal import MediaOracle, family_of, save_adapter, save_model
from parity.test_multimodal_serving import SERVED, Ask, Case, media_of, served

TARGETS = r".*\.embed_tokens|.*lm_head"
TOKENS = [3, 4, 5, 6, 7]


@pytest.mark.parametrize("name", SERVED)
def test_answers_are_those_of_peft(name: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", name)
    part = next(iter(family_of(folder).parts))
    loras = {"lora": save_adapter(folder, tmp_path / "lora", part, 3, target_modules=TARGETS)}
    tokens = save_adapter(folder, tmp_path / "tokens", part, 4, trainable_token_indices=TOKENS)
    weights = load_file(tokens / "adapter_model.safetensors")
    for key, tensor in weights.items():
        if key.endswith("trainable_tokens_delta"):
            tensor.copy_(torch.randn(tensor.shape))
    save_file(weights, tokens / "adapter_model.safetensors")
    settings: dict[str, Any] = {"enable_vocabulary_lora": True, "max_lora_vocabulary_rows": 8}
    oracles = {
        "lora": MediaOracle(folder, loras),
        "tokens": MediaOracle(folder, {"tokens": tokens}),
    }
    prompts = oracles["lora"].family.prompts
    text = f"say {' and '.join(prompts.values())} now"
    asks = [
        Ask(text, media_of(prompts, 1), {"lora": 1.0}),
        Ask(text, media_of(prompts, 1), {}),
        Ask("only a text", {}, {"lora": -0.5}),
        Ask(text, media_of(prompts, 2), {"tokens": 1.0}),
        Ask("a text", {}, {"tokens": 1.0}),
    ]
    with served(name, folder, **settings) as llm:
        case = Case(name, llm, oracles["lora"], loras | {"tokens": tokens})
        answers = case.answers(asks)
        llm.engine.check_integrity()
    for ask, answer in zip(asks, answers, strict=True):
        oracle = oracles["tokens" if "tokens" in ask.composition else "lora"]
        right = Case(name, llm, oracle, case.adapters).wanted(ask)
        assert answer.outputs[0].token_ids == right, ask.composition
    assert len({tuple(answer.outputs[0].token_ids) for answer in answers}) > 2
