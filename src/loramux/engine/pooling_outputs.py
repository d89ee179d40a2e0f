"""What `LLM.embed` and `LLM.classify` give back: vLLM's shapes. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

from loramux.types import PoolingOutput


class Answered(Protocol):
    """A prompt of which the engine has made something."""

    request_id: str
    prompt_token_ids: list[int]
    num_cached_tokens: int
    pooled: PoolingOutput | None


def _pooled(answered: Answered) -> PoolingOutput:
    assert answered.pooled is not None, "an answer without its values. This is a bug."
    return answered.pooled


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """One vector."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """A prompt and its embedding."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True

    @classmethod
    def of(cls, answered: Answered) -> Self:
        outputs = EmbeddingOutput(list(_pooled(answered).values))
        ids, cached = answered.prompt_token_ids, answered.num_cached_tokens
        return cls(answered.request_id, outputs, ids, cached)


@dataclass(frozen=True, slots=True)
class ClassificationOutput:
    """A value for each class, by number; `label` is the name of the likeliest, `labels` has all."""

    probs: list[float]
    label: str
    labels: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclass(frozen=True, slots=True)
class ClassificationRequestOutput:
    """A prompt and its classes."""

    request_id: str
    outputs: ClassificationOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True

    @classmethod
    def of(cls, answered: Answered) -> Self:
        pooled = _pooled(answered)
        outputs = ClassificationOutput(list(pooled.values), pooled.label, pooled.labels)
        ids, cached = answered.prompt_token_ids, answered.num_cached_tokens
        return cls(answered.request_id, outputs, ids, cached)
