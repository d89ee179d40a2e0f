"""Sequence-classification adapters as PEFT makes them, and what PEFT answers with them, in fp32."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

from tiny import DEFAULT_TARGETS, TARGETS

CONFIG = "adapter_config.json"


def save_classifier(
    model_folder: Path, folder: Path, num_labels: int, seed: int, **settings: Any
) -> Path:
    """An adapter with random LoRA and a random head, saved by PEFT itself."""
    family = json.loads((model_folder / "config.json").read_text())["model_type"]
    settings.setdefault("target_modules", TARGETS.get(family, DEFAULT_TARGETS))
    settings.setdefault("r", 4)
    settings.setdefault("lora_alpha", 8)
    torch.manual_seed(seed)
    model = _classifier(model_folder, num_labels)
    made = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **settings))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.15)
            elif "modules_to_save" in name:
                parameter.normal_(0, 0.1)
    made.save_pretrained(folder)
    return folder


def save_base_classifier(
    source: Path, folder: Path, labels: Sequence[str], **settings: Any
) -> Path:
    """A checkpoint of a sequence classifier with a random head, from a language model's."""
    torch.manual_seed(77)
    model = _classifier(source, len(labels), id2label=dict(enumerate(labels)), **settings)
    torch.nn.init.normal_(model.score.weight, 0, 0.1)
    model.save_pretrained(folder)
    for file in source.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _classifier(folder: Path, num_labels: int, **settings: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        *(folder,), num_labels=num_labels, dtype=torch.float32, **settings
    )


def peft_logits(
    model_folder: Path, adapters: Sequence[Path], num_labels: int, prompt: Sequence[int]
) -> torch.Tensor:
    """[labels] of one prompt under the sum of `adapters`, of which the first may have a head.

    PEFT loads no adapter without a head beside one that has it: the others are added to the weights."""
    model = _classifier(model_folder, num_labels).eval()
    with_head = [path for path in adapters if "SEQ_CLS" in (path / CONFIG).read_text()]
    for path in adapters:
        if path not in with_head:
            _add_to_weights(model, path)
    for path in with_head:
        model = PeftModel.from_pretrained(model, path).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(prompt)])).logits[0]  # [labels]


def _add_to_weights(model: Any, path: Path) -> None:
    config = json.loads((path / CONFIG).read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    with torch.no_grad():
        for key, a in tensors.items():
            if ".lora_A." in key:
                b = tensors[key.replace(".lora_A.", ".lora_B.")]
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                delta = config["lora_alpha"] / config["r"] * b @ a  # [out, in]
                model.get_submodule(name).weight += delta


def peft_hidden(
    model_folder: Path, adapter: Path | None, prompt: Sequence[int], num_labels: int = 2
) -> torch.Tensor:
    """The final hidden state [D] of the last token; without an adapter, transformers' own."""
    ids = torch.tensor([list(prompt)])  # [1, T]
    with torch.no_grad():
        if adapter is None:
            base = AutoModel.from_pretrained(model_folder, dtype=torch.float32).eval()
            return base(input_ids=ids).last_hidden_state[0, -1]  # [D]
        model = _classifier(model_folder, num_labels).eval()
        if "SEQ_CLS" in (adapter / CONFIG).read_text():
            model = PeftModel.from_pretrained(model, adapter).eval().base_model.model
        else:
            _add_to_weights(model, adapter)
        return model.model(input_ids=ids).last_hidden_state[0, -1]  # [D]
