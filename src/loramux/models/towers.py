"""The encoders of images and sound ("towers") with what connects them to the language model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from loramux.errors import EngineError
from loramux.layers.batch import UniformLoRA
from loramux.layers.tower import TowerStep
from loramux.models.encoders import Encoder, Inputs, encoder_of, modalities
from loramux.models.multimodal import Language
from loramux.types import MediaItem, Modality

Array = np.ndarray
KINDS = {"image": 1, "video": 2}  # of tokens, to `get_rope_index`
SECONDS = ("second_per_grid_ts", "video_second_per_grid")


class Towers:
    """Makes vectors of media by the model's own functions, and says where media stand.

    `encode` belongs to the step loop's thread; `rope_index` may be called from any."""

    def __init__(
        self, model: PreTrainedModel, language: Language, step: TowerStep, *, adapted: bool
    ):
        """`step` is what layers with adapters look at; `adapted` says whether there are any."""
        self._model = model
        self._language = language
        self._step = step
        self._adapted = adapted
        self._hidden = int(model.config.get_text_config().hidden_size)

    @property
    def modalities(self) -> frozenset[Modality]:
        return modalities(self._model)

    @property
    def layers(self) -> int:
        """L: how many layers get vectors of their own, beside those that replace embeddings."""
        return self._language.layers

    @property
    def vector_bytes(self) -> int:
        """Bytes of what stands for one token on the device."""
        return (1 + self.layers) * self._hidden * self._model.dtype.itemsize

    @property
    def work_bytes(self) -> int:
        """About what it takes to make one vector: a layer's tensors for each of the patches or frames
        that become one token. They are estimated by the largest widths that the towers' linear layers
        have, and by how many tokens the last of them puts together."""
        config = self._model.config
        parts = [getattr(config, name, None) for name in ("vision_config", "audio_config")]
        widths = [_width(part) * _merged(part, config) for part in parts if part is not None]
        width = max(widths, default=0)
        return (width + 8 * self._hidden) * self._model.dtype.itemsize

    @property
    def sees_whole(self) -> bool:
        """Whether tokens of an image see all of that image, as in Gemma 3."""
        return bool(self._model.config.model_type == "gemma3")

    @torch.inference_mode()
    def encode(
        self,
        items: Sequence[MediaItem],
        loras: Sequence[UniformLoRA | None] | UniformLoRA | None,
    ) -> list[torch.Tensor]:
        """The vectors of each item, [1 + L, n, D] with n its `num_vectors`, each its own memory. `loras`
        are one for all, or one an item.

        Raises EngineError naming an item that does not get so many."""
        if loras is None or isinstance(loras, UniformLoRA):
            loras = [loras] * len(items)
        assert self._adapted or not any(loras), "adapters where no tower has any. This is a bug."
        groups: dict[object, list[int]] = defaultdict(list)
        for index, (item, lora) in enumerate(zip(items, loras, strict=True)):
            encoder = self._encoder(item)
            shapes = [tuple(tensor.shape[1:]) for tensor in _tensors(item, encoder).values()]
            own = None if encoder.mixed else lora
            key = (id(encoder), *_tensors(item, encoder), *shapes, own)
            groups[key if encoder.together else index].append(index)
        found: dict[int, torch.Tensor] = {}
        for group in groups.values():
            vectors = self._encode([items[i] for i in group], [loras[i] for i in group])
            found.update(zip(group, vectors, strict=True))
        return [found[index] for index in range(len(items))]

    def _encoder(self, item: MediaItem) -> Encoder:
        encoder = encoder_of(self._model, item)
        if encoder is None:
            raise EngineError(f"{_named(item)}: {type(self._model).__name__} takes none")
        return encoder

    def _encode(
        self, items: Sequence[MediaItem], loras: Sequence[UniformLoRA | None]
    ) -> list[torch.Tensor]:
        """As `encode`, of items whose tensors fit together."""
        encoder = self._encoder(items[0])
        each = [_tensors(item, encoder) for item in items]
        inputs = {key: self._placed([one[key] for one in each]) for key in each[0]}
        counts = [item.num_vectors for item in items]
        shares = [(lora, len(one[encoder.keys[0]])) for lora, one in zip(loras, each, strict=True)]
        try:
            with self._step.of(shares, self._model.device):
                rows, deep = encoder.run(self._model, inputs, sum(counts))  # [M, D] each
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise EngineError(f"{_named(items[0])} cannot be encoded: {error}") from error
        if len(rows) != sum(counts):
            if len(items) > 1:  # one of them will say that it is the one
                alone = zip(items, loras, strict=True)
                return [v for item, lora in alone for v in self._encode([item], [lora])]
            raise EngineError(
                f"{_named(items[0])}: its encoder gave {len(rows)} vectors where the prompt has "
                f"{sum(counts)} tokens for them"
            )
        stacked = torch.stack((rows, *deep))  # [1 + L, M, D]
        if len(items) == 1:
            return [stacked]
        return [part.clone() for part in stacked.split(counts, dim=1)]

    def _placed(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """One behind the other on the device, floats in the model's type."""
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        moved = joined.to(self._model.device, non_blocking=True)
        return moved.to(self._model.dtype) if moved.is_floating_point() else moved

    def rope_index(
        self, token_ids: Sequence[int], items: Sequence[MediaItem]
    ) -> tuple[Array | None, int]:
        """(positions int32 [3, N], shift) of a prompt with `items`, see `MediaPrompt`; (None, 0) where
        a token's position is its index."""
        if not self._language.mrope or not items:
            return None, 0
        ids = torch.tensor([token_ids])  # [1, N]
        ordered = sorted(items, key=lambda item: item.spans[0])
        grids = {
            f"{kind}_grid_thw": _joined(ordered, f"{kind}_grid_thw") for kind in ("image", "video")
        }
        seconds = next((s for s in (_joined(ordered, k) for k in SECONDS) if s is not None), None)
        if self._model.config.model_type == "qwen2_5_omni_thinker":
            heard = _joined(ordered, "feature_attention_mask")
            more: dict[str, Any] = {
                "attention_mask": torch.ones_like(ids),
                "audio_seqlens": heard,
                "second_per_grids": seconds,
            }
            owner: Any = self._model
        else:
            owner = self._model.model
            more = {"mm_token_type_ids": _kinds(len(token_ids), items)}
            more |= {} if seconds is None else {"second_per_grid_ts": seconds}
        places, shift = owner.get_rope_index(ids, **grids, **more)  # [3, 1, N], [1, 1]
        found = places[:, 0]  # [3, N]
        if torch.equal(found, torch.arange(len(token_ids)).expand(3, -1)):
            return None, int(shift)
        return found.to(torch.int32).numpy(), int(shift)


def _width(part: PreTrainedConfig) -> int:
    """Elements of a layer's tensors that are alive at once, for one of its rows."""
    hidden = max(
        getattr(part, n, None) or 0 for n in ("hidden_size", "d_model", "embed_dim", "hidden_dim")
    )
    names = ("intermediate_size", "encoder_ffn_dim")
    inner = max((getattr(part, n, None) or 0 for n in names), default=0) or 4 * hidden
    return 8 * int(hidden) + 2 * int(inner)


def _merged(part: PreTrainedConfig, whole: PreTrainedConfig) -> int:
    """How many rows of a tower become one vector."""
    side = int(
        getattr(part, "spatial_merge_size", None) or getattr(whole, "scale_factor", None) or 1
    )
    if (ratio := getattr(whole, "downsample_ratio", None)) is not None:
        side = round(1 / ratio)
    if (tokens := getattr(whole, "mm_tokens_per_image", None)) is not None:  # Gemma 3 pools
        return max(1, (int(part.image_size) // int(part.patch_size)) ** 2 // int(tokens))
    return side * side


def _tensors(item: MediaItem, encoder: Encoder) -> Inputs:
    """What of an item's inputs `encoder` takes."""
    there = ((key, item.inputs.get(key)) for key in encoder.keys)
    return {key: torch.as_tensor(value) for key, value in there if value is not None}


def _joined(items: Sequence[MediaItem], key: str) -> torch.Tensor | None:
    """The tensors `key` of those items that have one, one behind the other."""
    found = [torch.as_tensor(item.inputs[key]) for item in items if key in item.inputs]
    if key == "feature_attention_mask":
        found = [mask.sum(-1) for mask in found]  # [B] frames each
    return torch.cat(found) if found else None


def _kinds(tokens: int, items: Sequence[MediaItem]) -> torch.Tensor:
    """What each token stands for [1, N]: text, an image or a video."""
    kinds = torch.zeros(1, tokens, dtype=torch.int32)  # [1, N]
    for item in items:
        for start, stop in item.spans:
            kinds[0, start:stop] = KINDS.get(item.modality, 0)
    return kinds


def _named(item: MediaItem) -> str:
    return f"the {item.modality} {item.digest[:12]}"
