"""What is made of the last hidden state of a prompt: an embedding, or classes by a head.

The head is the one that an adapter of the request brings, or else the base model's. Prompts of one
step may each have another, with labels of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from loramux.adapters.heads import Head
from loramux.adapters.store import AdapterStore
from loramux.engine.plan import StepResult
from loramux.engine.sequence import Sequence as Answer
from loramux.errors import AdapterLoadFailed, InvalidField
from loramux.models.loader import LoadedModel
from loramux.types import AdapterRef, Delta, PoolingOutput, PoolingParams, Request

Acquired = Sequence[tuple[AdapterRef, float]]


@dataclass(frozen=True, slots=True)
class PoolingModel:
    """What a model has for pooling."""

    hidden_size: int
    head: Head | None = None
    """Of the base model, which then has no language-model head."""

    pad_token_id: int | None = None
    no_pooling: str | None = None
    """Why there are no hidden states to be had, if there are none."""

    no_embeddings: str | None = None
    """Why it gives no embeddings, if it does not."""

    @classmethod
    def of(cls, loaded: LoadedModel) -> PoolingModel:
        width = loaded.attached.schema.hidden_size
        reasons = (loaded.no_pooling, loaded.no_embeddings)
        return cls(width, loaded.head, loaded.pad_token_id, *reasons)

    def check_generation(self) -> None:
        """Raises InvalidField where the base model generates nothing."""
        if self.head is not None:
            raise InvalidField(
                "this model is a sequence classifier, which generates nothing",
                field="model",
                remedy="use /classify or /v1/embeddings (LLM.classify, LLM.embed)",
            )

    def prompt(self, token_ids: tuple[int, ...], params: PoolingParams) -> tuple[int, ...]:
        """What of a prompt counts. For transformers and PEFT a sequence is classified at its last token
        that is no padding; what follows it cannot change that one."""
        if params.task != "classify" or self.pad_token_id is None:
            return token_ids
        end = next(
            (n for n in range(len(token_ids), 0, -1) if token_ids[n - 1] != self.pad_token_id), 1
        )
        return token_ids[:end]

    def check(self, params: PoolingParams | None, adapters: Acquired) -> None:
        """Whether these adapters can do that; `params` None: generate. Raises InvalidField."""
        heads = {ref.digest: ref.name for ref, _ in adapters if ref.labels}
        names = ", ".join(repr(name) for name in heads.values())
        if params is None:
            if heads:
                raise InvalidField(
                    f"adapter {names} is a sequence classifier, which generates nothing",
                    field="lora",
                    remedy="use /classify or /v1/embeddings (LLM.classify, LLM.embed)",
                )
        elif self.no_pooling is not None:
            raise InvalidField(self.no_pooling, field="model")
        elif params.task == "embed":
            if self.no_embeddings is not None:
                raise InvalidField(self.no_embeddings, field="model")
        elif activated := [ref.name for ref, _ in adapters if ref.invocation]:
            raise InvalidField(
                f"adapter {', '.join(map(repr, activated))} is an activated LoRA, which PEFT applies "
                "nowhere when it classifies",
                field="lora",
                remedy="leave it out",
            )
        elif len(heads) > 1:
            raise InvalidField(
                f"the adapters {names} have a classification head each, and a request has one",
                field="lora",
            )
        elif not heads and self.head is None:
            whose = ", ".join(repr(ref.name) for ref, _ in adapters)
            raise InvalidField(
                f"{f'adapter {whose}' if whose else 'the base model'} has no classification head",
                field="lora" if adapters else "model",
                remedy='name an adapter that was trained with task_type "SEQ_CLS"',
            )


class Pooler:
    """Turns hidden states into answers, on the thread of the step loop."""

    def __init__(self, model: PoolingModel, store: AdapterStore | None):
        self._model = model
        self._store = store

    @torch.inference_mode()
    def answer(self, alive: Iterable[Answer], result: StepResult) -> Iterator[tuple[Answer, Delta]]:
        """The whole answer of each sequence that `result` has a hidden state of."""
        for answer in alive:
            hidden = result.hidden.get(answer.sequence_id)  # [D]
            if hidden is None:
                continue
            request = answer.request
            delta = Delta(request.request_id, answer.index, num_cached_tokens=answer.num_cached)
            assert request.pooling is not None
            if request.pooling.task == "embed":
                pooled = _embedding(hidden, request.pooling)
            elif (head := self._head(request)) is not None:
                pooled = _classes(hidden, request.pooling, head)
            else:
                error = AdapterLoadFailed("the adapter went away meanwhile", remedy="try again")
                yield answer, replace(delta, finish_reason="error", error=error)
                continue
            yield answer, replace(delta, finish_reason="stop", pooled=pooled)

    def _head(self, request: Request) -> Head | None:
        for ref, _ in request.adapters:
            if ref.labels:
                return self._store.head(ref.digest) if self._store is not None else None
        return self._model.head


def _embedding(hidden: torch.Tensor, params: PoolingParams) -> PoolingOutput:
    """hidden [D] float32."""
    vector = hidden[: params.dimensions]  # [d]
    if params.normalize:
        vector = torch.nn.functional.normalize(vector, dim=0)
    return PoolingOutput(_floats(vector))


def _classes(hidden: torch.Tensor, params: PoolingParams, head: Head) -> PoolingOutput:
    """hidden [D] float32."""
    values = head.logits(hidden)  # [labels]
    if params.use_activation:
        values = head.probabilities(values)
    return PoolingOutput(_floats(values), head.labels)


def _floats(values: torch.Tensor) -> array[float]:
    """[N] float32."""
    return array("f", values.numpy().tobytes())
