"""Text to tokens and back: the stock tokenizer and chat template, and text that grows token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loramux.errors import ConfigError, InvalidField

REPLACEMENT = "\ufffd"


class TextProcessor:
    """The tokenizer of one model. Safe to call from several threads for reading."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None):
        self.tokenizer = tokenizer
        self.chat_template = chat_template

    @classmethod
    def load(cls, source: str, revision: str | None, chat_template: str | None) -> TextProcessor:
        """Raises ConfigError when there is no tokenizer in `source`."""
        path = Path(source).expanduser()
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(path) if path.exists() else source, revision=revision
            )
        except (OSError, ValueError, KeyError) as error:
            line = (str(error).strip().splitlines() or [""])[0]
            raise ConfigError(
                f"no tokenizer can be read from {source!r}: {line}",
                field="tokenizer",
                remedy="name another with --tokenizer",
            ) from error
        return cls(tokenizer, _read_template(chat_template))

    @property
    def eos_token_id(self) -> int | None:
        value = self.tokenizer.eos_token_id
        return value if isinstance(value, int) else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return str(
            self.tokenizer.decode(
                list(token_ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Messages -> prompt tokens. Raises InvalidField where template and messages disagree."""
        if self.chat_template is None and not self.tokenizer.chat_template:
            raise InvalidField(
                "this model has no chat template",
                field="messages",
                remedy="use /v1/completions, or start with --chat-template",
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(template_kwargs or {}),
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidField(
                f"the chat template refuses the messages: {error}", field="messages"
            ) from error
        return self.encode(str(text), add_special_tokens=False)


def _read_template(value: str | None) -> str | None:
    """A template given as text or as the path of a file."""
    if value is None or "{" in value or "\n" in value:
        return value
    path = Path(value).expanduser()
    if not path.is_file():
        raise ConfigError(f"there is no chat template file {value!r}", field="chat_template")
    return path.read_text(encoding="utf-8")


class Detokenizer:
    """Text of one answer as its tokens arrive.

    A token may hold half a character, and some tokenizers join neighbours differently, so each new
    piece is the difference of two decodings of the same short window.
    """

    def __init__(
        self, text: TextProcessor, prompt_ids: Sequence[int], *, skip_special_tokens: bool
    ):
        self._text = text
        self._skip = skip_special_tokens
        self._window = list(prompt_ids[-6:])
        self._stable = len(self._window)  # tokens of the window whose text has been given out
        self._given = self._decode(self._window)

    def add(self, token_id: int) -> str:
        """The text that `token_id` adds; "" while a character is incomplete."""
        self._window.append(token_id)
        full = self._decode(self._window)
        if full.endswith(REPLACEMENT) and len(self._window) - self._stable < 8:
            return ""
        return self._advance(full)

    def flush(self) -> str:
        """What is left of an incomplete character when the answer ends."""
        return self._advance(self._decode(self._window))

    def _advance(self, full: str) -> str:
        piece = full[len(self._given) :]
        self._window = self._window[-6:] if len(self._window) > 24 else self._window
        self._given = self._decode(self._window) if len(self._window) == 6 else full
        self._stable = len(self._window)
        return piece

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._text.decode(token_ids, skip_special_tokens=self._skip)
