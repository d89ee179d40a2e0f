"""What an adapter would be on a model, without loading the model's weights."""

from __future__ import annotations

from pathlib import Path

import torch

from loramux.adapters.downloads import Downloads
from loramux.adapters.peft import read_adapter
from loramux.adapters.peft_deltas import PeftDeltas
from loramux.adapters.report import BindingReport
from loramux.adapters.self_test import FileDeltas, NumericReport, check_deltas
from loramux.adapters.weights import AdapterWeights
from loramux.config import EngineConfig, LoRAConfig
from loramux.models.loader import load_schema
from loramux.models.own_tokenizers import OwnTokenizers
from loramux.models.text import TextProcessor
from loramux.models.vocabulary import CheckpointVocabulary
from loramux.schema import ModelSchema


def check_adapter(path: str, model: str, lora: LoRAConfig | None = None) -> BindingReport:
    """Which tensor of the adapter in `path`, a folder or another source, binds to which module of
    `model`, without loading it.

    Raises AdapterRejected with every reason when loramux would refuse it.
    """
    _, _, _, report = _read(path, model, lora or LoRAConfig())
    return report


def check_deltas_of(path: str, model: str, lora: LoRAConfig | None = None) -> NumericReport:
    """How far what loramux computes of an adapter is from PEFT's, on random activations for every
    linear layer; from float64 straight from the file where PEFT is not installed.

    Raises as `check_adapter` does.
    """
    lora = lora or LoRAConfig()
    folder, schema, weights, _ = _read(path, model, lora)
    wanted: FileDeltas | PeftDeltas
    try:
        wanted = PeftDeltas(folder)
    except ImportError:
        wanted = FileDeltas(folder)
    return check_deltas(weights, schema.aliases, _dtype(lora), wanted)


def _read(
    path: str, model: str, lora: LoRAConfig
) -> tuple[Path, ModelSchema, AdapterWeights, BindingReport]:
    config = EngineConfig(model=model, lora=lora)
    schema = load_schema(config).schema
    own = lora.lora_tokenizers == "auto"
    downloads = Downloads(
        lora.max_adapter_download_bytes, lora.adapter_fetch_timeout_s, tokenizers=own
    )
    folder = downloads.fetch(path).folder
    name = path.rstrip("/").rpartition("/")[2] or path
    # The model's own data type is not known here; float32 tells every difference.
    base = CheckpointVocabulary(config, schema, torch.float32)
    tokenizer = OwnTokenizers(
        lambda: TextProcessor.load(model, None, None), takes_media=bool(schema.towers)
    )
    weights, report = read_adapter(
        *(name, folder, schema, lora, _dtype(lora)),
        base=base,
        tokenizer=tokenizer if own else None,
    )
    return folder, schema, weights, report


def _dtype(lora: LoRAConfig) -> torch.dtype:
    """Float32 unless the settings name one: the model's own type is not known here."""
    if lora.lora_dtype == "auto":
        return torch.float32
    dtype: torch.dtype = getattr(torch, lora.lora_dtype)
    return dtype
