"""What was measured or read about model and machine before any "auto" becomes a value."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Widths:
    """What the size of a step's tensors depends on, in elements of `itemsize` bytes a row."""

    hidden: int = 0
    product: int = 0  # out of the widest product: gate and up together
    inner: int = 0  # into the widest product: what the MLP multiplies down
    vocab: int = 0
    pairs: int = 0  # experts of a token
    routed: int = 0  # of one pair of token and expert, all that is alive at once
    itemsize: int = 2
    fused: bool = True  # the model's own forward keeps more at a time


@dataclass(frozen=True, slots=True)
class EncoderFacts:
    """Of the towers and connectors of a multimodal model, in bytes a vector that they give."""

    vector_bytes: int  # where it is kept
    work_bytes: int  # while it is made, about
    sees_whole: bool = False  # tokens of an image see all of it


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Sizes in bytes."""

    dtype: str
    device: str
    max_positions: int
    kv_bytes_per_token: int
    free_bytes: int  # that may be taken beside the weights, which are there already
    adapter_elements_per_row: int = 0  # A and B of one rank row, over all modules
    adapter_outputs: int = 0  # output features of all modules that may have gains and shifts
    length_limit_reason: str = "the model's max_position_embeddings"
    total_bytes: int = 0  # of the GPU; 0 where there is none
    weight_bytes: int = 0
    attention_bytes: int = 0  # what the attention library keeps, beside the KV cache
    widths: Widths = field(default_factory=Widths)
    encoder: EncoderFacts | None = None  # None: a text model
    modalities: tuple[str, ...] = ()  # what a request may carry beside text
    row_granule: int = 1  # rank rows of an adapter come in these, see `EngineConfig.row_granule`

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")
