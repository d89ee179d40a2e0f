"""A model from a folder or the Hub onto the device, wrapped and ready, or refused by name."""

from __future__ import annotations

import contextlib
import logging
import threading
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from loramux.adapters.heads import Head
from loramux.config import EngineConfig, ModelFacts
from loramux.config.engine import step_tokens
from loramux.config.memory_advice import weights_do_not_fit
from loramux.errors import ConfigError, UnsupportedModel
from loramux.models.attach import ATTENTION_NAME, Attached, attach, register_attention
from loramux.models.device_memory import DeviceMemory, device_memory, refused_when_full
from loramux.models.fill import fill_from_checkpoint, fill_random, materialise
from loramux.models.fuse import fuse
from loramux.models.heads import is_classifier, no_embeddings, read_head
from loramux.models.hidden import check_hidden
from loramux.models.measure import measure
from loramux.models.multimodal import (
    attention_setting,
    is_multimodal,
    language_config,
    model_class,
    refusals,
)
from loramux.models.proof import check_paging
from loramux.models.shards import Shards, cut_model
from loramux.parallel import ALONE, Group, PlannedGroup

logger = logging.getLogger(__name__)
_BUILDING = threading.Lock()

# Rotary embeddings whose frequencies depend on the longest sequence of the batch.
BATCH_DEPENDENT_ROPE = {"dynamic"}
LENGTH_SWITCHED_ROPE = {"longrope"}


@dataclass(slots=True)
class LoadedModel:
    """The wrapped model and what was learned while loading it."""

    attached: Attached
    facts: ModelFacts
    eos_token_ids: frozenset[int]
    vocab_size: int
    head: Head | None = None  # of a sequence classifier
    pad_token_id: int | None = None
    no_pooling: str | None = None  # why it gives no hidden states
    no_embeddings: str | None = None  # why it gives none


def _weights_refused(
    config: EngineConfig, hf_config: PreTrainedConfig, device: str, free_bytes: int
) -> ConfigError:
    """Why a model did not get onto `device`."""
    need = sum(p.numel() for p in _on_meta(config, hf_config).parameters())
    return weights_do_not_fit(device, need * _dtype(config, hf_config).itemsize, free_bytes)


def pick_device(device: str) -> str:
    """`auto` is the GPU when there is one. Raises ConfigError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "this machine has no usable CUDA GPU", field="device", remedy="--device cpu"
        )
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not served", field="device", remedy="cpu or cuda")
    return device


def load_model(config: EngineConfig, group: Group = ALONE) -> LoadedModel:
    """Read, place and wrap the model of `config`, or this rank's part of it; all ranks do it together.

    Raises ConfigError when it cannot be read and UnsupportedModel when it cannot be entered.
    """
    device = pick_device(config.device)
    hf_config = read_config(config.model, config.revision, config.tensor_parallel_size)
    positions, reason = _max_positions(hf_config)
    with refused_when_full(device, partial(_weights_refused, config, hf_config, device)):
        if config.load_format == "dummy" or group.size > 1:
            model, shards = _in_parts(config, hf_config, device, group)
        else:
            model, shards = _from_pretrained(config, hf_config), None
            model.to(device)
        model.eval().requires_grad_(False)
        attached = attach(model, config.lora, shards)
        check_paging(attached)
        length = min(config.max_model_len or positions, positions)
        attached.decoder = fuse(attached, length, step_tokens(config, on_gpu=device != "cpu"))
    facts = measure(attached, config, device, device_memory(device), (positions, reason))
    text = hf_config.get_text_config()
    return LoadedModel(
        *(attached, facts, _eos_ids(model), int(text.vocab_size)),
        head=read_head(config, hf_config, model.dtype) if group.rank == 0 else None,
        pad_token_id=_pad_id(model),
        no_pooling=check_hidden(attached),
        no_embeddings=no_embeddings(config) if group.rank == 0 else None,
    )


def read_config(
    model: str, revision: str | None, tensor_parallel_size: int = 1
) -> PreTrainedConfig:
    """The model's configuration, refused early where the kind of model is not served."""
    if model.startswith(("/", ".", "~")) and not Path(model).expanduser().is_dir():
        raise ConfigError(f"the model folder {model!r} does not exist", field="model")
    try:
        config = AutoConfig.from_pretrained(_local(model), revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the model {model!r} cannot be read: {_first_line(error)}",
            field="model",
            remedy="give a local folder with config.json, or a Hub id that can be reached",
        ) from error
    quantised = getattr(config, "quantization_config", None)
    config = language_config(config)
    reasons = []
    if config.is_encoder_decoder:
        reasons.append("it is an encoder-decoder model")
    if getattr(config, "add_cross_attention", False):
        reasons.append("it attends to the states of an encoder (add_cross_attention)")
    if quantised or getattr(config, "quantization_config", None):
        reasons.append("its weights are quantised, which is not served yet")
    if is_multimodal(config) and not config.is_encoder_decoder:
        reasons += refusals(config, tensor_parallel_size)
    if reasons:
        raise UnsupportedModel(
            f"{config.model_type} model {model!r} is not served: {'; '.join(reasons)}",
            field="model",
        )
    if is_classifier(config):
        config.tie_word_embeddings = True  # see models/heads.py
    return config


def _local(model: str) -> str:
    path = Path(model).expanduser()
    return str(path) if path.exists() else model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _from_pretrained(config: EngineConfig, hf_config: PreTrainedConfig) -> PreTrainedModel:
    register_attention()
    dtype: Any = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        loaded = model_class(hf_config).from_pretrained(
            _local(config.model),
            revision=config.revision,
            config=hf_config,
            dtype=dtype,
            attn_implementation=attention_setting(hf_config, ATTENTION_NAME),
            output_loading_info=True,
            use_safetensors=True if config.load_format == "safetensors" else None,
        )
    except OSError as error:
        raise ConfigError(
            f"the weights of {config.model!r} cannot be read: {_first_line(error)}", field="model"
        ) from error
    except (ValueError, KeyError) as error:
        raise _cannot_enter(config, hf_config, error) from error
    model, info = loaded
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ConfigError(
            f"the checkpoint {config.model!r} lacks {len(missing)} weights, {missing[0]} among them",
            field="model",
        )
    _take_off_adapters(model)
    return model


def _take_off_adapters(model: PreTrainedModel) -> None:
    """Where an adapter lies beside the weights, as in Granite-Speech's folders, transformers puts it on
    the model if PEFT is there. It is one like any other: a request names it, or does not."""
    for name, module in list(model.named_modules()):
        inner = getattr(module, "base_layer", None)
        if inner is not None and type(module).__module__.startswith("peft."):
            model.set_submodule(name, inner)


def _in_parts(
    config: EngineConfig, hf_config: PreTrainedConfig, device: str, group: Group
) -> tuple[PreTrainedModel, Shards]:
    """A model made without weights, cut to what this rank holds, and filled with that on the device."""
    model = _on_meta(config, hf_config)
    shards = cut_model(model, group, config.lora)
    materialise(model, device)
    if config.load_format == "dummy":
        fill_random(model, shards, config.seed, device)
    else:
        fill_from_checkpoint(model, shards, config)
        with contextlib.suppress(OSError):  # not every checkpoint has one
            model.generation_config = GenerationConfig.from_pretrained(
                _local(config.model), revision=config.revision
            )
    return model, shards


def _dtype(config: EngineConfig, hf_config: PreTrainedConfig) -> torch.dtype:
    """What the weights will be in, as far as the configuration says."""
    configs = (hf_config, hf_config.get_text_config())
    declared = next((c.dtype for c in configs if getattr(c, "dtype", None)), torch.float32)
    dtype: torch.dtype = declared if config.dtype == "auto" else getattr(torch, config.dtype)
    return dtype


def _on_meta(config: EngineConfig, hf_config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights. Raises UnsupportedModel."""
    register_attention()
    try:
        # transformers sets torch's default dtype while it builds, for all threads.
        with _BUILDING, torch.device("meta"):
            model: PreTrainedModel = model_class(hf_config).from_config(
                hf_config,
                attn_implementation=attention_setting(hf_config, ATTENTION_NAME),
                dtype=_dtype(config, hf_config),
            )
            return model
    except (ValueError, KeyError) as error:
        raise _cannot_enter(config, hf_config, error) from error


def _cannot_enter(
    config: EngineConfig, hf_config: PreTrainedConfig, error: Exception
) -> UnsupportedModel:
    why = _first_line(error)
    if ATTENTION_NAME in why:
        why = "its attention does not go through transformers' attention registry"
    return UnsupportedModel(
        f"{hf_config.model_type} model {config.model!r} cannot be entered: {why}", field="model"
    )


def _max_positions(config: PreTrainedConfig) -> tuple[int, str]:
    """Longest context, and why: some rotary embeddings would make one request change another's."""
    text = config.get_text_config()
    positions = int(getattr(text, "max_position_embeddings", 0) or 1 << 20)
    kinds = _rope_types(getattr(text, "rope_parameters", None) or {})
    if kinds & BATCH_DEPENDENT_ROPE:
        return (
            positions,
            "where this model's dynamic rotary embedding starts to depend on the batch",
        )
    if kinds & LENGTH_SWITCHED_ROPE:
        original = _original_positions(text)
        if original and original < positions:
            logger.info("context limited to %d: longer ones switch rotary factors", original)
            return original, "where this model switches its rotary factors for the whole batch"
    return positions, "the model's max_position_embeddings"


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """rope_type, of the model or of each layer type."""
    nested = [p for p in parameters.values() if isinstance(p, dict) and "rope_type" in p]
    return {str(p.get("rope_type")) for p in [parameters, *nested]}


def _original_positions(text: PreTrainedConfig) -> int | None:
    parameters = getattr(text, "rope_parameters", None) or {}
    found = parameters.get("original_max_position_embeddings") or getattr(
        text, "original_max_position_embeddings", None
    )
    return int(found) if found else None


def _eos_ids(model: PreTrainedModel) -> frozenset[int]:
    ids: set[int] = set()
    for source in (model.generation_config, model.config):
        value = getattr(source, "eos_token_id", None)
        ids.update([value] if isinstance(value, int) else value or [])
    if not ids:  # a multimodal model may say it of its language model only
        value = getattr(model.config.get_text_config(), "eos_token_id", None)
        ids.update([value] if isinstance(value, int) else value or [])
    return frozenset(ids)


def _pad_id(model: PreTrainedModel) -> int | None:
    value = model.config.get_text_config().pad_token_id
    return value if isinstance(value, int) else None


def load_schema(config: EngineConfig) -> Attached:
    """The model's structure without its weights, for checking adapters: no memory, no download of
    weights. Raises as `load_model` does."""
    return attach(
        _on_meta(config, read_config(config.model, config.revision, config.tensor_parallel_size)),
        config.lora,
    )


def facts_before_loading(config: EngineConfig, memory: DeviceMemory, device: str) -> ModelFacts:
    """The facts of the model of `config` as `load_model` would find them on `device`, read from its
    configuration alone. `memory` is what the device has before. Raises as `load_model` does.

    Of several ranks they are those of rank 0, which has most."""
    hf_config = read_config(config.model, config.revision, config.tensor_parallel_size)
    positions, reason = _max_positions(hf_config)
    model = _on_meta(config, hf_config)
    shards = cut_model(model, PlannedGroup(0, config.tensor_parallel_size), config.lora)
    attached = attach(model, config.lora, shards)
    facts = measure(attached, config, device, memory, (positions, reason))
    text = hf_config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rows = min(config.max_model_len or positions, positions)
    if attached.language is not None and attached.language.mrope:
        rows += step_tokens(config, on_gpu=facts.on_gpu)
    table = rows * head * facts.widths.itemsize
    tables = len(set(getattr(text, "layer_types", None) or [""]))  # as `fuse` makes them
    weights = facts.weight_bytes + tables * table
    if weights > memory.free:
        raise weights_do_not_fit(device, weights, memory.free)
    return replace(facts, weight_bytes=weights, free_bytes=memory.free - weights)
