"""From what a caller asks for to a Request, or the reason why it cannot be served. Any thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from loramux.adapters.store import AdapterStore
from loramux.config import EngineConfig
from loramux.engine.activation import inside_media, starts_of
from loramux.engine.pooling import PoolingModel
from loramux.engine.validation import (
    tokenizer_of,
    validate_pooling,
    validate_request,
    vocabulary_of,
)
from loramux.errors import InvalidField
from loramux.types import (
    NOTHING_SAMPLED,
    AdapterRef,
    AdapterUse,
    MediaPrompt,
    PoolingParams,
    Request,
    SamplingParams,
    compose,
)

logger = logging.getLogger(__name__)

MOST_WARNED = 10_000  # versions that are remembered

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
        self._sums_early = config.row_granule > 1
        self._store = store
        self._vocab_size = vocab_size
        self._pooling = pooling
        self._warned: set[str] = set()  # digests

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
            self._check_affine(acquired)
            text = self._text_of(acquired)
            starts = starts_of([ref for ref, _ in acquired], prompt)
            _check_starts(starts, acquired, media)
        except Exception:
            self.release(acquired)
            raise
        arrival_s = time.monotonic()
        tenants = tuple(sorted({use.name for use in uses}))
        request = Request(
            *(request_id, prompt, sampling, acquired, arrival_s, media, pooling),
            starts=starts,
            tenants=tenants,
            text=text,
        )
        self._warn_of(request)
        return request

    def _warn_of(self, request: Request) -> None:
        """Say in the log, once for each version, that a prompt did not invoke an adapter."""
        for (ref, _), start in zip(request.adapters, request.starts, strict=False):
            if start is None and ref.digest not in self._warned:
                if len(self._warned) >= MOST_WARNED:
                    self._warned.clear()
                self._warned.add(ref.digest)
                logger.warning(
                    "adapter %r was not invoked: a prompt lacks its alora_invocation_tokens %s, so the "
                    "base model answers without it, as in PEFT (said once for each version)",
                    *(ref.name, list(ref.invocation[:16])),
                )

    def text_of(self, uses: Sequence[AdapterUse]) -> Any:
        """The `TextProcessor` that adapters bring, which the caller holds; None: the base model's.
        Raises UnknownModel, or InvalidField where several bring one."""
        if not uses or self._store is None:
            return None
        return self._text_of(self._store.registry.refs(uses))

    def _text_of(self, acquired: Acquired) -> Any:
        digest = tokenizer_of(acquired)
        own = None if digest is None or self._store is None else self._store.tokenizer(digest)
        return None if own is None else own.text

    def release(self, acquired: Acquired) -> None:
        """Count one user less of each adapter."""
        if self._store is not None and acquired:
            self._store.registry.release([ref.digest for ref, _ in acquired])

    def _check_affine(self, acquired: Acquired) -> None:
        """Raise InvalidField for what adapters with DoRA or trained biases cannot do."""
        refs = {ref.digest: ref for ref, _ in acquired}
        if not any(ref.affine for ref in refs.values()):
            return
        members = compose([(ref.digest, scale) for ref, scale in acquired], in_turn=True)
        for digest, scale in members:
            if refs[digest].affine and scale != 1.0:
                raise InvalidField(
                    f"adapter {refs[digest].name!r} has DoRA or trained biases, which are not linear in "
                    f"its scale: {scale:g} is not served",
                    field="lora",
                    remedy="leave its scale at 1",
                )
        last = max((at for at, (digest, _) in enumerate(members) if refs[digest].affine), default=0)
        if any(refs[digest].invocation for digest, _ in members[:last]):
            raise InvalidField(
                "in a sum, an activated adapter must come behind those with DoRA or trained biases: it "
                "begins to apply later",
                field="lora",
            )
        if self._sums_early and any(refs[digest].affine for digest, _ in members[:-1]):
            raise InvalidField(
                "with fully_sharded_loras an adapter with DoRA or trained biases must be the last of a "
                "sum: deltas are added before the ranks' sums, and its gains behind them",
                field="lora",
            )

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


def _check_starts(
    starts: Sequence[int | None], acquired: Acquired, media: MediaPrompt | None
) -> None:
    """Raise InvalidField for an adapter that is invoked amid the vectors of an image, sound or video."""
    found = inside_media(starts, media.items if media else ())
    if found is not None:
        number, item = found
        raise InvalidField(
            f"the invocation of adapter {acquired[number][0].name!r} begins inside the tokens of "
            f"{'an' if item.modality in ('image', 'audio') else 'a'} {item.modality}",
            field="prompt",
            remedy="end the prompt with the adapter's alora_invocation_tokens, as text",
        )
