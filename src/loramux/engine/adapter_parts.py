"""What an engine that serves adapters is made of beside its scheduler and runner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from loramux.adapters.pool import AdapterPool
from loramux.adapters.store import AdapterStore
from loramux.config import EngineConfig
from loramux.engine.inbox import Inbox
from loramux.engine.leading import LeadingRunner
from loramux.engine.loads import AdapterLoads, Arrived
from loramux.engine.runner import Runner
from loramux.errors import LoramuxError
from loramux.models.own_tokenizers import OwnTokenizers
from loramux.models.text import TextProcessor
from loramux.models.vocabulary import CheckpointVocabulary
from loramux.schema import ModelSchema
from loramux.types import AdapterRef


def make_store(
    config: EngineConfig,
    schema: ModelSchema,
    runner: Runner | LeadingRunner,
    inbox: Inbox,
    on_gone: Callable[[str], None],
    on_pins: Callable[[Mapping[str, AdapterRef]], None],
    text: TextProcessor,
) -> AdapterStore | None:
    """The store, or None where no adapters are served. Both callbacks come through the inbox; `text` is
    the base model's tokenizer."""
    if (lora := config.lora) is None:
        return None
    return AdapterStore(
        schema,
        lora,
        getattr(torch, lora.lora_dtype),
        reserved_names=config.model_names,
        on_gone=lambda digest: inbox.post(partial(on_gone, digest)),
        on_pins=lambda refs: inbox.post(partial(on_pins, refs)),
        rehearse=runner.rehearse,
        head_dtype=runner.attached.model.dtype,
        base=CheckpointVocabulary(config, schema, runner.attached.model.dtype),
        tokenizer=OwnTokenizers(lambda: text, takes_media=bool(schema.towers)),
    )


def make_loads(
    store: AdapterStore | None, runner: Runner | LeadingRunner, inbox: Inbox, arrived: Arrived
) -> AdapterLoads | None:
    """What brings adapters to the device; `arrived` comes through the inbox."""
    if store is None:
        return None

    def tell(ref: AdapterRef, failure: LoramuxError | None) -> None:
        inbox.post(partial(arrived, ref, failure))

    return AdapterLoads(store, runner.load, tell)


def tell_evictions(store: AdapterStore | None, pool: AdapterPool | None) -> None:
    """Have the store's listeners hear of what leaves the device."""
    if store is not None and pool is not None:
        pool.on_evict = partial(store.evicted, place="device")
