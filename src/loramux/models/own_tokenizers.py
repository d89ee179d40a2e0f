"""Tokenizers and chat templates of adapters beside the base model's: read, compared with it, and kept
once for all adapters that have the same."""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from loramux.adapters.tokenizers import (
    ADDED_NAME,
    CONFIG_NAME,
    SPECIAL_NAME,
    TOKENIZER_NAME,
    OwnTokenizer,
    Template,
    TokenizerFiles,
)
from loramux.models.text import TextProcessor, backend_of

MOST_SEEN = 10_000  # tokenizers of which it is remembered what they are
MOST_OWN = 64  # tokens of each that are remembered: the last, which a vocabulary may lack
SHOWN = 4  # tokens that a reason names

# Of tokenizer_config.json: what names code or files, or is read elsewhere.
LEFT_OUT = ("auto_map", "chat_template", "tokenizer_class", "init_inputs", "name_or_path")


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was found out about the files of a tokenizer: a `print` that is equal for those that do the
    same, whether it is the `same` as the base model's, and its tokens (id, text) that the base model's
    lacks, the last ids in front."""

    print: str
    same: bool
    own_tokens: tuple[tuple[int, str], ...] = ()


class OwnTokenizers:
    """`adapters.tokenizers.BaseTokenizer` of one base model; safe to call from any thread."""

    def __init__(self, base: Callable[[], TextProcessor], *, takes_media: bool = False):
        """`base` is asked when the first adapter brings a tokenizer or a template. A model that
        `takes_media` keeps the tokenizer of its processor."""
        self._get_base = base
        self._takes_media = takes_media
        self._lock = threading.Lock()  # the same files are read once
        self._base: TextProcessor | None = None
        self._seen: OrderedDict[tuple[str, bool], _Seen] = OrderedDict()
        self._tokenizers: WeakValueDictionary[str, PreTrainedTokenizerBase] = WeakValueDictionary()
        self._texts: WeakValueDictionary[str, TextProcessor] = WeakValueDictionary()

    def own(self, files: TokenizerFiles, size: int) -> tuple[OwnTokenizer | None, list[str]]:
        """See `BaseTokenizer.own`."""
        with self._lock:
            base = self._base = self._base or self._get_base()
            template = None if self._is_base_template(files.template) else files.template
            reasons = [] if template is None else reasons_of_template(template)
            tokenizer, print_of_it = None, ""
            if files.has_tokenizer:
                try:
                    seen, tokenizer = self._look(files, _mentions_pad(template or base.template))
                except ValueError as error:
                    return None, [*reasons, f"{TOKENIZER_NAME} is no tokenizer: {error}"]
                if tokenizer is not None:
                    print_of_it = seen.print
                    reasons += self._reasons_of(seen, size)
            else:
                reasons += self._unread(files)
            if reasons or (tokenizer is None and template is None):
                return None, reasons
            return self._combined(files, tokenizer, print_of_it, template), []

    # --- under the lock ------------------------------------------------------------------------

    @property
    def _of_base(self) -> TextProcessor:
        assert self._base is not None
        return self._base

    def _is_base_template(self, template: Template | None) -> bool:
        base = self._of_base
        known = [base.chat_template, base.tokenizer.chat_template]
        # Of several, a folder that was downloaded has the default one alone.
        known += [one.get("default") for one in known if isinstance(one, Mapping)]
        return template is None or template in known

    def _look(
        self, files: TokenizerFiles, uses_pad: bool
    ) -> tuple[_Seen, PreTrainedTokenizerBase | None]:
        """What is known of the files, and their tokenizer if it is not the base model's in effect.
        Raises ValueError where they make none."""
        key = (files.tokenizer_hash(), uses_pad)
        seen = self._seen.get(key)
        if seen is not None and seen.same:
            return seen, None
        tokenizer = None if seen is None else self._tokenizers.get(seen.print)
        if seen is None or tokenizer is None:
            tokenizer = _load(files, self._of_base)
            seen = self._seen[key] = self._look_at(tokenizer, uses_pad)
            if len(self._seen) > MOST_SEEN:
                self._seen.popitem(last=False)
        if seen.same:
            return seen, None
        return seen, self._tokenizers.setdefault(seen.print, tokenizer)

    def _reasons_of(self, seen: _Seen, size: int) -> list[str]:
        """Why a tokenizer is not served with a vocabulary of `size`."""
        if self._takes_media:
            return [
                "a tokenizer of its own is not served with a model that takes media: its processor has "
                "one; a chat template of its own is served"
            ]
        outside = [f"{text!r} ({number})" for number, text in seen.own_tokens if number >= size]
        if not outside:
            return []
        more = " and more" if len(outside) > SHOWN else ""
        return [
            f"its tokenizer has {', '.join(outside[:SHOWN])}{more}, outside its vocabulary of {size}: "
            "save it with the embedding that was resized"
        ]

    def _look_at(self, tokenizer: PreTrainedTokenizerBase, uses_pad: bool) -> _Seen:
        base = self._of_base.tokenizer
        own_print = _print_of(tokenizer, uses_pad)
        if own_print == _print_of(base, uses_pad):
            return _Seen(own_print, same=True)
        known = base.get_vocab()
        own = [(number, t) for t, number in tokenizer.get_vocab().items() if known.get(t) != number]
        return _Seen(own_print, False, tuple(sorted(own, reverse=True)[:MOST_OWN]))

    def _unread(self, files: TokenizerFiles) -> list[str]:
        """Why a folder without the tokenizer itself cannot do with the base model's."""
        if ADDED_NAME not in files.files:
            return []
        known = self._of_base.tokenizer.get_vocab()
        added = json.loads(files.files[ADDED_NAME])
        new = [text for text, number in added.items() if known.get(text) != number]
        if not new:
            return []
        return [
            f"{ADDED_NAME} adds {', '.join(map(repr, new[:SHOWN]))}, and there is no {TOKENIZER_NAME}: "
            "save transformers' fast tokenizer"
        ]

    def _combined(
        self,
        files: TokenizerFiles,
        tokenizer: PreTrainedTokenizerBase | None,
        print_of_it: str,
        template: Template | None,
    ) -> OwnTokenizer:
        of_template = files.template_hash() if template is not None else ""
        of_files = files.tokenizer_hash() if tokenizer is not None else ""
        key, content = (
            hashlib.sha256(f"{part}|{of_template}".encode()).hexdigest()
            for part in (print_of_it, of_files)
        )
        text = self._texts.get(key)
        if text is None:
            base = self._of_base
            text = TextProcessor(tokenizer or base.tokenizer, template or base.template)
            self._texts[key] = text
        return OwnTokenizer(key, content, text)


def reasons_of_template(template: Template) -> list[str]:
    """Why transformers' sandbox does not compile it."""
    named = {"": template} if isinstance(template, str) else template
    reasons = []
    for name, text in named.items():
        try:
            render_jinja_template(conversations=[], chat_template=text)
        except (TemplateError, RecursionError, MemoryError, ValueError, SyntaxError) as error:
            which = f"its chat template {name!r}" if name else "its chat template"
            line = getattr(error, "lineno", None)
            where = f" (line {line})" if line else ""
            reasons.append(f"{which} does not compile: {_one_line(error)}{where}")
    return reasons


def _mentions_pad(template: str | Mapping[str, str] | None) -> bool:
    texts = template.values() if isinstance(template, Mapping) else [template or ""]
    return any("pad_token" in text for text in texts)


def _load(files: TokenizerFiles, base: TextProcessor) -> PreTrainedTokenizerBase:
    """The tokenizer, by the class of the base model's where it says that it is of that class, else as
    tokenizer.json describes it. Raises ValueError."""
    kind: Any = type(base.tokenizer)
    told = str(files.config.get("tokenizer_class") or "").removesuffix("Fast")
    if base.backend is None or told != kind.__name__.removesuffix("Fast"):
        kind = PreTrainedTokenizerFast
    config = {
        key: value
        for key, value in files.config.items()
        if key not in LEFT_OUT and not key.endswith("_file")
    }
    with tempfile.TemporaryDirectory(prefix="loramux-tokenizer-") as folder:
        for name in (TOKENIZER_NAME, SPECIAL_NAME, ADDED_NAME):
            if name in files.files:
                (Path(folder) / name).write_bytes(files.files[name])
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        try:
            tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(folder, local_files_only=True)
            tokenizer.encode("a")  # what cannot be used at all is refused now
        except BaseException as error:
            # What goes wrong in the `tokenizers` library itself is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(_one_line(error)) from error
    return tokenizer


def _print_of(tokenizer: PreTrainedTokenizerBase, uses_pad: bool) -> str:
    """Equal for tokenizers that do the same: how they cut and write, and the special tokens that end
    answers and that templates see."""
    backend = backend_of(tokenizer)
    written = "" if backend is None else backend.to_str()
    # Truncation and padding stand in front; transformers sets them for each call.
    text = written[max(0, written.find('"added_tokens":')) :]
    special = {
        name: str(token)
        for name, token in tokenizer.special_tokens_map.items()
        if name != "pad_token" or uses_pad
    }
    shown = json.dumps([special, getattr(tokenizer, "split_special_tokens", False)], sort_keys=True)
    return hashlib.sha256(f"{shown}{text}".encode("utf-8", "surrogatepass")).hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
