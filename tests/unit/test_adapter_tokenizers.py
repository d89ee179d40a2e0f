"""Tokenizers and chat templates in adapters' folders: which are read, which are the base model's, and
which are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from loramux import LLM, LoRARequest, SamplingParams
from loramux.adapters import tokenizers
from loramux.adapters.peft import read_adapter
from loramux.adapters.tokenizers import MOST_BYTES, OwnTokenizer, read_tokenizer_files
from loramux.config import EngineConfig, LoRAConfig
from loramux.engine.adapter_check import check_adapter
from loramux.errors import AdapterRejected, InvalidField
from loramux.models.loader import load_schema
from loramux.models.own_tokenizers import OwnTokenizers
from loramux.models.text import TextProcessor
from tiny import TEMPLATE, VOCAB, TinyWorld, tokenizer

OWN = TEMPLATE.replace("assistant", "helper")
CONFIG = LoRAConfig(max_lora_rank=8)


@pytest.fixture(scope="module")
def schema(tiny_world: TinyWorld) -> Any:
    return load_schema(EngineConfig(model=str(tiny_world.model), lora=CONFIG)).schema


@pytest.fixture
def base(tiny_world: TinyWorld) -> OwnTokenizers:
    return OwnTokenizers(lambda: TextProcessor.load(str(tiny_world.model), None, None))


@pytest.fixture
def folder(tiny_world: TinyWorld, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_world.adapters["a"], tmp_path / "a"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders from which a tokenizer was made."""
    found: list[str] = []
    plain = PreTrainedTokenizerFast.from_pretrained.__func__  # type: ignore[attr-defined]

    def noted(cls: Any, path: Any, *args: Any, **how: Any) -> Any:
        found.append(str(path))
        return plain(cls, path, *args, **how)

    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", classmethod(noted))
    return found


def _read(folder: Path, schema: Any, base: OwnTokenizers | None) -> tuple[str, OwnTokenizer | None]:
    """Its digest and its tokenizer."""
    weights, _ = read_adapter("a", folder, schema, CONFIG, torch.float32, tokenizer=base)
    assert weights.ref.tokenizer == (weights.tokenizer.key if weights.tokenizer else "")
    return weights.ref.digest, weights.tokenizer


def _own_words(*words: str) -> PreTrainedTokenizerFast:
    """The base model's, in which some tokens have another text."""
    made = tokenizer()
    state = json.loads(made.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    for place, word in enumerate(words):
        del vocab[f"<extra_{VOCAB - 1 - place}>"]
        vocab[word] = VOCAB - 1 - place
    changed = made.backend_tokenizer.from_str(json.dumps(state))
    other = PreTrainedTokenizerFast(
        tokenizer_object=changed, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    other.chat_template = TEMPLATE
    return other


# --- what is the base model's --------------------------------------------------------------------


def test_the_base_models_tokenizer_costs_nothing(
    folder: Path, schema: Any, base: OwnTokenizers, loads: list[str]
) -> None:
    digest, own = _read(folder, schema, base)
    assert own is None and loads == []
    saved = tokenizer()
    saved.save_pretrained(folder)
    assert _read(folder, schema, base) == (digest, None)
    first = len(loads)
    assert first == 2, "the base model's, and this one once"
    assert _read(folder, schema, base) == (digest, None)
    assert len(loads) == first, "the same bytes are looked at once"
    assert not base._tokenizers and not base._texts


def test_what_trainers_set_changes_nothing(folder: Path, schema: Any, base: OwnTokenizers) -> None:
    digest, _ = _read(folder, schema, base)
    saved = tokenizer()
    saved.backend_tokenizer.enable_padding(length=64)
    saved.backend_tokenizer.enable_truncation(16)
    saved.pad_token = saved.eos_token
    saved.padding_side, saved.model_max_length = "left", 77
    saved.save_pretrained(folder)
    assert "64" in (folder / "tokenizer.json").read_text()
    assert _read(folder, schema, base) == (digest, None)
    padded = OWN + "{{ pad_token }}"
    (folder / "chat_template.jinja").write_text(padded)
    _, own = _read(folder, schema, base)
    assert own is not None and own.text.tokenizer.pad_token == "<eos>", "this template shows it"


def test_files_in_an_older_form_are_the_same(
    folder: Path, schema: Any, base: OwnTokenizers
) -> None:
    digest, _ = _read(folder, schema, base)
    saved = tokenizer()
    saved.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {
        "auto_map": {"AutoTokenizer": ["evil.Code", "evil.Code"]},
        "vocab_file": "/etc/passwd",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    special = {"bos_token": "<bos>", "eos_token": {"content": "<eos>", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    assert _read(folder, schema, base) == (digest, None)


# --- what is its own -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jinja", "json", "config", "named"])
def test_a_template_alone(
    folder: Path, schema: Any, base: OwnTokenizers, form: str, loads: list[str]
) -> None:
    plain, _ = _read(folder, schema, base)
    value: Any = OWN
    if form == "named":
        value = [{"name": "default", "template": OWN}, {"name": "tool_use", "template": "T"}]
    name = {"jinja": "chat_template.jinja", "json": "chat_template.json"}.get(
        form, "tokenizer_config.json"
    )
    text = OWN if form == "jinja" else json.dumps({"chat_template": value})
    (folder / name).write_text(text)
    digest, own = _read(folder, schema, base)
    assert digest != plain and own is not None
    turns = [{"role": "user", "content": "x"}]
    assert own.text.render_text(turns) == "<user>x\n<helper>"
    assert own.text.render_text(turns, tools=[]) == (
        "T" if form == "named" else "<user>x\n<helper>"
    )
    assert own.text.tokenizer is base._of_base.tokenizer, "no second tokenizer"
    assert _read(folder, schema, None) == (plain, None), "not read, not part of the digest"
    assert len(loads) == 1


def test_a_file_goes_before_the_configuration(
    folder: Path, schema: Any, base: OwnTokenizers
) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "no"}))
    (folder / "chat_template.jinja").write_bytes(OWN.encode() + b"!\r\n.")
    _, own = _read(folder, schema, base)
    assert own is not None
    assert own.text.render_text([{"role": "user", "content": "x"}]).endswith("<helper>!\n.")


def test_further_templates(
    folder: Path, schema: Any, tiny_world: TinyWorld, base: OwnTokenizers
) -> None:
    made = tokenizer()
    made.chat_template = {"default": OWN, "tool_use": "T", "rag": "R"}
    made.save_pretrained(folder)
    plain, _ = _read(folder, schema, None)
    digest, own = _read(folder, schema, base)
    assert own is not None and own.text.template == made.chat_template and digest != plain
    named = OwnTokenizers(lambda: TextProcessor(made))
    assert _read(folder, schema, named) == (plain, None), "the base model has these too"
    shutil.rmtree(folder / "additional_chat_templates")
    assert _read(folder, schema, named) == (plain, None), "as it is downloaded"
    _, alone = _read(folder, schema, base)
    assert alone is not None and alone.text.template == OWN
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "x.jinja").write_bytes(b"\xff")
    with pytest.raises(AdapterRejected, match="no UTF-8"):
        _read(folder, schema, base)
    for number in range(20):
        (more / f"{number}.jinja").write_text("x")
    with pytest.raises(AdapterRejected, match="more than 16 files"):
        _read(folder, schema, base)


def test_equal_tokenizers_are_kept_once_and_others_apart(
    folder: Path, tiny_world: TinyWorld, tmp_path: Path, schema: Any, base: OwnTokenizers
) -> None:
    second = Path(shutil.copytree(tiny_world.adapters["b"], tmp_path / "b"))
    for place in (folder, second):
        _own_words("q", "qq").save_pretrained(place)
    plain = {_read(place, schema, None)[0] for place in (folder, second)}
    (one, first), (two, again) = (_read(place, schema, base) for place in (folder, second))
    assert first is not None and again is not None and len({one, two} - plain) == 2
    assert (first.key, first.text) == (again.key, again.text)
    assert first.text.template == TEMPLATE
    config = json.loads((second / "tokenizer_config.json").read_text())
    (second / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 9}))
    changed, like = _read(second, schema, base)
    assert like is not None and changed != two, "other files, which do the same"
    assert (like.key, like.text) == (first.key, first.text)
    del like
    _own_words("q", "zz").save_pretrained(second)
    three, third = _read(second, schema, base)
    assert third is not None and third.key != first.key and three != two
    (second / "chat_template.jinja").write_text(OWN)
    four, fourth = _read(second, schema, base)
    assert fourth is not None and four != three and fourth.key != third.key
    assert fourth.text.tokenizer is third.text.tokenizer
    del first, again, third, fourth
    assert not base._tokenizers and not base._texts, "nobody has them any more"


def test_without_a_template_the_base_models_is_used(
    folder: Path, schema: Any, tiny_world: TinyWorld
) -> None:
    given = TextProcessor.load(str(tiny_world.model), None, OWN)
    made = _own_words("q")
    made.chat_template = None
    made.save_pretrained(folder)
    _, own = _read(folder, schema, OwnTokenizers(lambda: given))
    assert own is not None and own.text.template == OWN, "the operator's"


def test_an_eos_of_its_own_is_enough(folder: Path, schema: Any, base: OwnTokenizers) -> None:
    made = tokenizer()
    made.eos_token = "<extra_300>"
    made.save_pretrained(folder)
    _, own = _read(folder, schema, base)
    assert own is not None and own.text.eos_token_id == 300


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOST_BYTES)
def test_large_files_are_refused_before_they_are_read(
    folder: Path, schema: Any, base: OwnTokenizers, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tokenizers.MOST_BYTES, name, 100)
    (folder / name).write_text(" " * 101)
    with pytest.raises(AdapterRejected, match=f"{name} has more than 100 bytes.*--lora-tokenizers"):
        _read(folder, schema, base)
    assert _read(folder, schema, None)[1] is None


def _broken(folder: Path, kind: str) -> str:
    """Something wrong in the folder, and what the refusal says."""
    if kind == "tokens":
        made = tokenizer()
        made.add_tokens(["<new>"])
        made.save_pretrained(folder)
        return rf"'<new>' \({VOCAB}\), outside its vocabulary of {VOCAB}"
    if kind == "added":
        (folder / "added_tokens.json").write_text(json.dumps({"<new>": VOCAB, "<eos>": 2}))
        (folder / "chat_template.jinja").write_text(OWN)
        return "added_tokens.json adds '<new>'"
    if kind == "media":
        _own_words("q").save_pretrained(folder)
        return "a model that takes media"
    name, text, message = {
        "json": ("tokenizer.json", "{", "tokenizer.json is no tokenizer"),
        "empty": ("tokenizer.json", "{}", "tokenizer.json is no tokenizer"),
        "list": ("tokenizer_config.json", "[1]", "tokenizer_config.json is no JSON object"),
        "special": ("special_tokens_map.json", "nul", "special_tokens_map.json is no JSON"),
        "template": ("chat_template.jinja", "{% for x in y %}\n{{", r"does not compile: .*line 2"),
        "filter": ("chat_template.jinja", "{{ x | nofilter }}", "does not compile"),
        "number": ("chat_template.json", '{"chat_template": 3}', "is no text"),
        "bytes": ("chat_template.jinja", "\udcff", "no UTF-8"),
    }[kind]
    (folder / name).write_text(text, errors="surrogateescape")
    return message


KINDS = ["tokens", "added", "media", "json", "empty", "list", "special", "template", "filter"]


@pytest.mark.parametrize("kind", [*KINDS, "number", "bytes"])
def test_what_cannot_be_used_is_refused(
    folder: Path, schema: Any, tiny_world: TinyWorld, kind: str
) -> None:
    message = _broken(folder, kind)
    base = OwnTokenizers(
        lambda: TextProcessor.load(str(tiny_world.model), None, None), takes_media=kind == "media"
    )
    for _ in range(2):
        with pytest.raises(AdapterRejected, match=message) as caught:
            _read(folder, schema, base)
        assert "--lora-tokenizers base" in str(caught.value)
    assert _read(folder, schema, None)[1] is None


def test_all_reasons_come_at_once(folder: Path, schema: Any, base: OwnTokenizers) -> None:
    _broken(folder, "tokens")
    _broken(folder, "template")
    with pytest.raises(AdapterRejected, match=r"(?s)compile.*<new>"):
        _read(folder, schema, base)


def test_nothing_beside_is_read(folder: Path) -> None:
    for name in ("tokenizer.model", "vocab.json", "tokenization_evil.py", "spiece.model"):
        (folder / name).write_bytes(b"x")
    assert read_tokenizer_files(folder) == (None, [])
    (folder / "tokenizer.json").mkdir()
    assert read_tokenizer_files(folder) == (None, [])


# --- in an engine --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["auto", "base"])
def llm(tiny_world: TinyWorld, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(
        str(tiny_world.model),
        enable_lora=True,
        device="cpu",
        max_lora_rank=8,
        lora_tokenizers=request.param,
    ) as made:
        yield made


def test_the_setting_decides(llm: LLM, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(OWN)
    lora = LoRARequest("a", lora_path=str(folder), load_inplace=True)
    once = SamplingParams(temperature=0, max_tokens=1)
    (output,) = llm.chat([{"role": "user", "content": "x"}], once, lora_request=lora)
    uses_own = llm.config.lora is not None and llm.config.lora.lora_tokenizers == "auto"
    assert output.prompt == f"<user>x\n<{'helper' if uses_own else 'assistant'}>"
    store = llm.engine.require_store()
    assert (store.tokenizer(store.registry.current("a").digest) is not None) == uses_own  # type: ignore[union-attr]
    assert len(store._tokenizers) == uses_own


def test_a_template_that_fails_ends_its_request_only(llm: LLM, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[99].content / 0 }}")
    lora = LoRARequest("a", lora_path=str(folder), load_inplace=True)
    once = SamplingParams(temperature=0, max_tokens=1)
    messages = [{"role": "user", "content": "x"}]
    if llm.config.lora is not None and llm.config.lora.lora_tokenizers == "auto":
        with pytest.raises(InvalidField, match="chat template refuses"):
            llm.chat(messages, once, lora_request=lora)
    assert llm.chat(messages, once)[0].finished
    assert llm.generate("x", once, lora_request=lora)[0].finished


def test_the_check_tells_of_it(tiny_world: TinyWorld, folder: Path, llm: LLM) -> None:
    lora = llm.config.lora
    plain = check_adapter(str(folder), str(tiny_world.model), lora)
    assert not plain.own_tokenizer and "of its own" not in plain.format()
    (folder / "chat_template.jinja").write_text(OWN)
    found = check_adapter(str(folder), str(tiny_world.model), lora)
    assert lora is not None
    assert found.own_tokenizer == (lora.lora_tokenizers == "auto")
    served = llm.engine.add_adapter("checked", str(folder), replace=True)
    assert served.digest == found.digest
    assert (found.digest != plain.digest) == found.own_tokenizer
