"""From what a caller asks for to a Request, or the reason why it cannot be served. Any thread."""

from __future__ import annotations

import time
from collections.abc import Sequence

from loramux.adapters.store import AdapterStore
from loramux.config import EngineConfig
from loramux.engine.pooling import PoolingModel
from loramux.engine.validation import validate_pooling, validate_request, vocabulary_of
from loramux.errors import InvalidField
from loramux.types import (
    NOTHING_SAMPLED,
    AdapterRef,
    AdapterUse,
    MediaPrompt,
    PoolingParams,
    Request,
    SamplingParams,
)

Acquired = tuple[tuple[AdapterRef, float], ...]


class Admission:
    """Checks requests against the model and its adapters."""

    def __init__(
        self,
        config: EngineConfig,
        store: AdapterStore | None,
        vocab_size: int,
        pooling: PoolingModel,
    ):
        """`config` is resolved; without a `store` only the base model is served."""
        assert config.max_model_len is not None
        self._max_model_len = config.max_model_len
        self._max_loras = config.lora.max_loras if config.lora else 0
        self._store = store
        self._vocab_size = vocab_size
        self._pooling = pooling

    def admit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | PoolingParams,
        uses: Sequence[AdapterUse],
        media: MediaPrompt | None = None,
    ) -> Request:
        """The request, with the `media` that stand in its prompt, counted as a user of each of its
        adapters. Raises a RequestError, having counted none."""
        prompt, limit = tuple(prompt_token_ids), self._max_model_len
        if media is not None:  # tokens behind the prompt may be so far ahead of their number
            limit -= max(0, media.shift)
        if isinstance(params, SamplingParams):
            self._pooling.check_generation()
        acquired = self._acquire(uses)
        try:
            size = vocabulary_of(acquired, self._vocab_size)
            if isinstance(params, SamplingParams):
                sampling, pooling = validate_request(prompt, params, limit, size), None
            else:
                validate_pooling(prompt, params, limit, size, self._pooling.hidden_size)
                prompt = self._pooling.prompt(prompt, params)
                sampling, pooling = NOTHING_SAMPLED, params
            self._pooling.check(pooling, acquired)
        except Exception:
            self.release(acquired)
            raise
        arrival_s = time.monotonic()
        return Request(request_id, prompt, sampling, acquired, arrival_s, media, pooling)

    def release(self, acquired: Acquired) -> None:
        """Count one user less of each adapter."""
        if self._store is not None and acquired:
            self._store.registry.release([ref.digest for ref, _ in acquired])

    def _acquire(self, uses: Sequence[AdapterUse]) -> Acquired:
        if not uses:
            return ()
        if self._store is None:
            raise InvalidField(
                "this engine serves no adapters", field="lora", remedy="start it with enable_lora"
            )
        acquired = self._store.registry.acquire(uses)
        distinct = {ref.digest for ref, _ in acquired}
        if len(distinct) > self._max_loras:
            self.release(acquired)
            raise InvalidField(
                f"{len(distinct)} adapters in one request are more than max_loras "
                f"({self._max_loras})",
                field="lora",
            )
        return acquired
