"""Adapters with a tokenizer and a chat template of their own, as trainers save them, and what
transformers and PEFT answer with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from parity.vocabularies import VocabularyOracle, save_vocabulary
from tiny import VOCAB, tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>"]
WORDS = ["hello", " bakery"]
WIDE = VOCAB + len(SPECIAL) + len(WORDS)


def chat_tokenizer(template: str = CHATML) -> PreTrainedTokenizerBase:
    """The base model's with two special tokens, of which one ends answers, and two words."""
    made = tokenizer()
    made.add_special_tokens({"extra_special_tokens": SPECIAL})
    made.add_tokens(WORDS)
    made.eos_token = SPECIAL[1]
    made.chat_template = template
    return made


def save_chat_adapter(model: Path, folder: Path, seed: int, template: str = CHATML) -> Path:
    """An adapter that was trained with `chat_tokenizer`, and its tokenizer beside it."""
    save_vocabulary(
        model, folder, seed, resize=WIDE, modules_to_save=["embed_tokens", "lm_head"], strength=0.3
    )
    chat_tokenizer(template).save_pretrained(folder)
    return folder


class ChatOracle:
    """transformers' generate with PEFT's adapter and the tokenizer in its folder."""

    def __init__(self, model: Path):
        self._model = model
        self._oracle = VocabularyOracle(model)

    def tokenizer(self, adapter: Path | None) -> PreTrainedTokenizerBase:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(adapter or self._model)
        return found

    def chat_ids(self, adapter: Path | None, messages: list[dict[str, str]]) -> list[int]:
        made = self.tokenizer(adapter)
        text = made.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(made.encode(text, add_special_tokens=False))

    def answer(
        self, adapter: Path | None, prompt: list[int], count: int, *, bias: dict[int, float]
    ) -> list[int]:
        """Greedy tokens until one ends the answer; `bias` is added to the logits of tokens."""
        ids = self.tokenizer(adapter)
        size = WIDE if adapter is not None else 0
        model = self._oracle.model(adapter, size)
        ends = {model.generation_config.eos_token_id, ids.eos_token_id}
        added = torch.zeros(size or VOCAB)  # [V]
        for token, value in bias.items():
            added[token] = value
        tokens: list[int] = []
        while len(tokens) < count and not ends & set(tokens):
            logits = self._oracle.logits(adapter, [*prompt, *tokens], size)[-1]  # [V]
            tokens.append(int((logits + added).argmax()))
        return tokens

    def hidden(self, adapter: Path, prompt: list[int]) -> torch.Tensor:
        """The final hidden state [D] of the last token."""
        return self._oracle.hidden(adapter, prompt, WIDE)

    def written(self, adapter: Path | None, tokens: list[int], *, special: bool = False) -> str:
        """The text of an answer, its end left out."""
        made: Any = self.tokenizer(adapter)
        return str(made.decode(tokens, skip_special_tokens=not special))
