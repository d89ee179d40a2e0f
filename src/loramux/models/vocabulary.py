"""The input embedding and the output head of a model, as adapters may change them; and their rows in
the checkpoint, to which full copies are compared."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from loramux.config import EngineConfig, LoRAConfig
from loramux.errors import ConfigError
from loramux.layers.embedding import ShardedEmbedding
from loramux.layers.linear import LinearSlice
from loramux.models.fill import CheckpointFiles
from loramux.models.shards import Part
from loramux.parallel import Stripe, all_of
from loramux.schema import ModelSchema, VocabularySpec

LORA_OFF = (
    "LoRA on the {} is served with --enable-vocabulary-lora only (enable_vocabulary_lora is off)"
)


def find_vocabulary(model: PreTrainedModel) -> VocabularySpec | None:
    """The vocabulary of a wrapped `model`; None where its parts are no embedding and no product."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    table = embedding.inner if isinstance(embedding, ShardedEmbedding) else embedding
    if not isinstance(table, nn.Embedding) or not isinstance(head, LinearSlice):
        return None
    size = int(model.config.get_text_config().vocab_size)
    if head.out_features != size or head.in_features != table.embedding_dim:
        return None
    if table is embedding and table.num_embeddings != size:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    merged = head.merged
    return VocabularySpec(
        *(names[id(embedding)], names[id(head)], size, table.embedding_dim),
        tied=_is_shared(merged.weight, table.weight),
        head_refused="" if merged.bias is None else "an output head with a bias is not served yet",
    )


def _is_shared(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is not None and one.untyped_storage()._cdata == other.untyped_storage()._cdata


def lora_refusals(
    spec: VocabularySpec | None, lora: LoRAConfig | None, left_out: dict[str, str]
) -> dict[str, str]:
    """Why embedding and head take no LoRA, as far as they do not. `left_out` are those that the
    deployment's target_modules leave out."""
    if spec is None:
        return {}
    if lora is not None and lora.enable_vocabulary_lora:
        return left_out
    names = zip(spec.modules, ("input embedding", "output head"), strict=True)
    return {module: LORA_OFF.format(name) for module, name in names}


@dataclass(slots=True)
class CheckpointVocabulary:
    """The rows of embedding and head in the safetensors files of `config.model`, as `dtype` holds them.

    They are read there and not from the device, whose steps would be held up, and of which each rank
    has a part."""

    config: EngineConfig
    schema: ModelSchema
    dtype: torch.dtype
    _files: CheckpointFiles | None = None
    _keys: dict[str, str] = field(default_factory=dict)  # module -> name of its weight there
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def rows(self, module: str, start: int, stop: int) -> torch.Tensor:
        """See `BaseVocabulary`."""
        assert self.schema.vocabulary is not None
        if self.config.load_format == "dummy":
            raise ValueError("its weights are random (load_format dummy)")
        size, width = self.schema.vocabulary.size, self.schema.vocabulary.width
        try:
            with self._lock:
                if self._files is None:
                    self._files = CheckpointFiles(self.config)
                key = self._key(module, self._files)
                if self._files.shape(key) != (size, width):
                    raise ValueError(f"{key} of the checkpoint is no [{size}, {width}]")
                part = Part((Stripe(start, stop, size), all_of(width)))
                return self._files.read(key, part).to(self.dtype)  # [stop - start, D]
        except (ConfigError, SafetensorError, OSError) as error:
            raise ValueError(str(error)) from error

    def _key(self, module: str, files: CheckpointFiles) -> str:
        if module in self._keys:
            return self._keys[module]
        spec = self.schema.vocabulary
        assert spec is not None
        modules = [module, *(m for m in spec.modules if spec.tied and m != module)]
        aliases = [(a, m) for a, m in self.schema.aliases.items() if m in modules]
        names = [*modules, *(alias for alias, _ in sorted(aliases))]
        known = [f"{name}.weight" for name in names]
        known += [name.removeprefix("model.") for name in known]
        found = next((name for name in known if name in files), None)
        if found is None:
            raise ValueError(f"the checkpoint has no {module}.weight")
        self._keys[module] = found
        return found
