"""The tokenizer and the chat template that a trainer saved beside an adapter, read as bytes.

    tokenizer.json            the tokenizer itself; without it only a chat template counts
    tokenizer_config.json     special tokens, and in older folders the chat template
    special_tokens_map.json, added_tokens.json
    chat_template.jinja, chat_template.json, additional_chat_templates/*.jinja

Nothing else is read: no code, no pickle, no sentencepiece model. What the files mean, and whether that
is anything but the base model's, `models.own_tokenizers` knows.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
SPECIAL_NAME = "special_tokens_map.json"
ADDED_NAME = "added_tokens.json"
TEMPLATE_NAME = "chat_template.jinja"
OLD_TEMPLATE_NAME = "chat_template.json"
MORE_TEMPLATES = "additional_chat_templates"
MOST_TEMPLATES = 16

MOST_BYTES = {
    TOKENIZER_NAME: 64 << 20,
    CONFIG_NAME: 4 << 20,
    SPECIAL_NAME: 1 << 20,
    ADDED_NAME: 4 << 20,
    TEMPLATE_NAME: 1 << 20,
    OLD_TEMPLATE_NAME: 1 << 20,
}
TOKENIZER_FILES = (TOKENIZER_NAME, CONFIG_NAME, SPECIAL_NAME, ADDED_NAME)
REMEDY = "start with --lora-tokenizers base to use the base model's for every adapter"

Template = str | dict[str, str]
"""A chat template, or several by name: transformers takes "default", and "tool_use" with tools."""


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a folder has: the bytes of `files` by name, and the chat template, if there is one."""

    files: Mapping[str, bytes] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    template: Template | None

    @property
    def has_tokenizer(self) -> bool:
        return TOKENIZER_NAME in self.files

    def tokenizer_hash(self) -> str:
        """Hex SHA-256 of the files of the tokenizer."""
        digest = hashlib.sha256()
        for name in TOKENIZER_FILES:
            data = self.files.get(name)
            if data is not None:
                digest.update(f"{name}|{len(data)}|".encode())
                digest.update(data)
        return digest.hexdigest()

    def template_hash(self) -> str:
        """Hex SHA-256 of the chat template."""
        return hashlib.sha256(json.dumps(self.template, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class OwnTokenizer:
    """A tokenizer with a chat template that is not the base model's.

    `key` is equal for those that do the same, `content` for those of equal files; `text` is the
    `models.text.TextProcessor` that has both."""

    key: str
    content: str
    text: Any = field(repr=False)


class BaseTokenizer(Protocol):
    """What an adapter's tokenizer is compared with."""

    def own(self, files: TokenizerFiles, size: int) -> tuple[OwnTokenizer | None, list[str]]:
        """What of `files` is not the base model's, for a vocabulary of `size` tokens; or every reason
        against it."""
        ...


def read_own_tokenizer(
    folder: Path, base: BaseTokenizer | None, size: int
) -> tuple[OwnTokenizer | None, list[str]]:
    """The tokenizer or chat template in `folder` that is not the base model's, for a vocabulary of
    `size` tokens (0: not known), or every reason against it. None where there is none, or `base` is
    None."""
    if base is None:
        return None, []
    files, reasons = read_tokenizer_files(folder)
    own = None
    if files is not None:
        own, reasons = base.own(files, size or sys.maxsize)
    return own, [f"{reason}; {REMEDY}" for reason in reasons]


def read_tokenizer_files(folder: Path) -> tuple[TokenizerFiles | None, list[str]]:
    """The files in `folder`, bounded before they are read, or every reason against them; (None, [])
    where there is neither a tokenizer nor a template."""
    files: dict[str, bytes] = {}
    reasons: list[str] = []
    for name in MOST_BYTES:
        try:
            if (data := _read(folder / name, MOST_BYTES[name])) is not None:
                files[name] = data
        except (OSError, ValueError) as error:
            reasons.append(f"{name} {error if isinstance(error, ValueError) else 'cannot be read'}")
    if reasons:
        return None, reasons
    config, reasons = _object(files, CONFIG_NAME)
    for name in (SPECIAL_NAME, ADDED_NAME):
        reasons += _object(files, name)[1]
    template, template_reasons = _template(files, config, folder / MORE_TEMPLATES)
    reasons += template_reasons
    if reasons or (template is None and TOKENIZER_NAME not in files):
        return None, reasons
    return TokenizerFiles(files, config, template), []


def _read(path: Path, most: int) -> bytes | None:
    """The bytes of a file, None if there is none. Raises ValueError for more than `most`."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"has more than {most} bytes")
    return data


def _object(files: Mapping[str, bytes], name: str) -> tuple[dict[str, Any], list[str]]:
    """A JSON object; empty where the file is not there."""
    if name not in files:
        return {}, []
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError):
        return {}, [f"{name} is no JSON"]
    return (value, []) if isinstance(value, dict) else ({}, [f"{name} is no JSON object"])


def _template(
    files: Mapping[str, bytes], config: Mapping[str, Any], more: Path
) -> tuple[Template | None, list[str]]:
    """The chat template: a file goes before the configuration, as in transformers. `more` is the folder
    of further files."""
    if files.get(TEMPLATE_NAME):
        found, reasons = _further(more)
        try:
            text = _text(files[TEMPLATE_NAME])
        except UnicodeDecodeError:
            return None, [*reasons, f"{TEMPLATE_NAME} is no UTF-8"]
        return ({**found, "default": text} if found else text), reasons
    older, reasons = _object(files, OLD_TEMPLATE_NAME)
    if reasons:
        return None, reasons
    for name, place in ((OLD_TEMPLATE_NAME, older), (CONFIG_NAME, config)):
        value = place.get("chat_template")
        if not value:
            continue
        if isinstance(value, str):
            return value, []
        named = _by_name(value)
        if named is None:
            return None, [f"the chat_template of {name} is no text, and no list of named ones"]
        return named, []
    return None, []


def _further(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Templates beside the default one, by name."""
    found: dict[str, str] = {}
    try:
        paths = sorted(folder.glob("*.jinja")) if folder.is_dir() else []
        if len(paths) > MOST_TEMPLATES:
            return {}, [f"{MORE_TEMPLATES} has more than {MOST_TEMPLATES} files"]
        for path in paths:
            if (data := _read(path, MOST_BYTES[TEMPLATE_NAME])) is not None:
                found[path.stem] = _text(data)
    except UnicodeDecodeError:
        return {}, [f"{MORE_TEMPLATES} has a file that is no UTF-8"]
    except (OSError, ValueError) as error:
        said = error if isinstance(error, ValueError) else "cannot be read"
        return {}, [f"a file of {MORE_TEMPLATES} {said}"]
    return found, []


def _text(data: bytes) -> str:
    """As a text file is read."""
    return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def _by_name(value: Any) -> dict[str, str] | None:
    """Templates by name, of which one can be the default; None if it is nothing of the kind."""
    if isinstance(value, list):
        if not all(isinstance(one, dict) for one in value):
            return None
        value = {str(one.get("name")): one.get("template") for one in value}
    if not isinstance(value, dict) or not value:
        return None
    if not all(isinstance(k, str) and isinstance(t, str) for k, t in value.items()):
        return None
    return dict(value)
