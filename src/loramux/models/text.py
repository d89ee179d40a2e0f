"""Text to tokens and back: the stock tokenizer and chat template, and text that grows token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loramux.errors import ConfigError, InvalidField

REPLACEMENT = "\ufffd"
CONTEXT = 6  # tokens before a piece that may change how it is written
MAX_HELD = 8  # tokens without text; then what there is counts as text


class TextProcessor:
    """The tokenizer of one model or adapter. Safe to call from several threads for reading."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | Mapping[str, str] | None = None,
    ):
        """`chat_template`, one or several by name, goes before the tokenizer's own."""
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
        return cls(tokenizer, read_template(chat_template))

    @property
    def eos_token_id(self) -> int | None:
        value = self.tokenizer.eos_token_id
        return value if isinstance(value, int) else None

    @property
    def backend(self) -> Tokenizer | None:
        """The tokenizer of the `tokenizers` library underneath, if it is one."""
        return backend_of(self.tokenizer)

    @property
    def template(self) -> str | Mapping[str, str] | None:
        """The chat template in use, or several by name."""
        if self.chat_template is not None:
            return self.chat_template
        own: str | Mapping[str, str] | None = self.tokenizer.chat_template
        return own or None

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

    def render_chat(self, messages: Sequence[dict[str, Any]], **settings: Any) -> list[int]:
        """Messages -> prompt tokens, with the settings and errors of `render_text`."""
        return self.encode(self.render_text(messages, **settings), add_special_tokens=False)

    def render_text(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Messages -> the prompt as the chat template writes it. Raises InvalidField where template and
        messages disagree."""
        template = self.template
        if isinstance(template, Mapping):
            named = "tool_use" if tools is not None and "tool_use" in template else "default"
            template = template.get(named)
        if template is None:
            raise InvalidField(
                "this model has no chat template",
                field="messages",
                remedy="use /v1/completions, or start with --chat-template",
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(template_kwargs or {}),
            )
        except Exception as error:  # a template may fail in any way
            raise InvalidField(
                f"the chat template refuses the messages: {error}", field="messages"
            ) from error
        return str(text)


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer of the `tokenizers` library underneath, if it is one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend if isinstance(backend, Tokenizer) else None


def read_template(value: str | None) -> str | None:
    """A template given as text or as the path of a file."""
    if value is None or "{" in value or "\n" in value:
        return value
    path = Path(value).expanduser()
    if not path.is_file():
        raise ConfigError(f"there is no chat template file {value!r}", field="chat_template")
    return path.read_text(encoding="utf-8")


class Detokenizer:
    """Text of one answer as its tokens arrive; "" while a character is incomplete.

    The last prompt tokens are the context of the first piece: some tokenizers join neighbours
    differently. Tokenizers of the `tokenizers` library stream by themselves. Where such a stream
    finds no end, or there is none, two decodings of a short window are compared.
    """

    def __init__(
        self, text: TextProcessor, prompt_ids: Sequence[int], *, skip_special_tokens: bool
    ):
        self._text = text
        self._skip = skip_special_tokens
        self._recent = list(prompt_ids[-CONTEXT:])  # given out, or part of the prompt
        self._held: list[int] = []  # tokens whose text has not been given out
        self._stream: DecodeStream | None = None
        self._window: _Window | None = None
        self._backend = text.backend
        # A stream gives its context out if that ends within a character.
        if self._backend is None or self._decode(self._recent).endswith(REPLACEMENT):
            self._use_window()
        else:
            self._stream = DecodeStream(ids=self._recent, skip_special_tokens=skip_special_tokens)

    def add(self, token_id: int) -> str:
        """The text that `token_id` adds."""
        if self._window is not None:
            return self._window.add(token_id)
        assert self._stream is not None and self._backend is not None
        self._held.append(token_id)
        try:
            piece = self._stream.step(self._backend, token_id)
        except Exception:  # the decoder changed text that was given out; it has no type of its own
            return self._use_window()
        if piece is None:
            return self._use_window() if len(self._held) >= MAX_HELD else ""
        self._recent = (self._recent + self._held)[-CONTEXT:]
        self._held.clear()
        return str(piece)

    def flush(self) -> str:
        """What is left of an incomplete character when the answer ends."""
        if self._window is None and not self._held:
            return ""
        pieces = self._use_window() if self._window is None else ""
        assert self._window is not None
        return pieces + self._window.flush()

    def _use_window(self) -> str:
        """Go on without the stream; the text of what it held."""
        self._window = _Window(self._decode, self._recent)
        return "".join([self._window.add(token) for token in self._held])

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._text.decode(token_ids, skip_special_tokens=self._skip)


class _Window:
    """Each piece is the difference of two decodings of the last tokens."""

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int]):
        self._decode = decode
        self._tokens = list(context)
        self._stable = len(self._tokens)  # tokens of the window whose text has been given out
        self._given = self._decode(self._tokens)

    def add(self, token_id: int) -> str:
        self._tokens.append(token_id)
        full = self._decode(self._tokens)
        if full.endswith(REPLACEMENT) and len(self._tokens) - self._stable < MAX_HELD:
            return ""
        return self._advance(full)

    def flush(self) -> str:
        return self._advance(self._decode(self._tokens))

    def _advance(self, full: str) -> str:
        piece = full[len(self._given) :]
        if len(self._tokens) > 4 * CONTEXT:
            self._tokens = self._tokens[-CONTEXT:]
            full = self._decode(self._tokens)
        self._given, self._stable = full, len(self._tokens)
        return piece
