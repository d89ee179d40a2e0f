"""A PEFT folder in, weights and a binding report out, or one refusal with every reason.

Nothing is allocated before the header has been checked against the model: names, shapes, ranks and
data types first, bytes last.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loramux.adapters.bindings import Bindings, bind
from loramux.adapters.header import (
    WEIGHTS_NAME,
    read_header,
)
from loramux.adapters.host_cache import HostMemory
from loramux.adapters.layout import digest_of, lay_out, num_elements
from loramux.adapters.peft_config import CONFIG_NAME, read_config
from loramux.adapters.report import BindingReport, BindingRow, summarise
from loramux.adapters.tokenizers import BaseTokenizer, read_own_tokenizer
from loramux.adapters.values import check_values
from loramux.adapters.vocabulary_rows import (
    BaseVocabulary,
    kept_copies,
    rows_report,
    untied,
)
from loramux.adapters.weights import (
    AdapterSource,
    AdapterWeights,
    FileIdentity,
    Layout,
    now_s,
)
from loramux.config import LoRAConfig
from loramux.errors import AdapterNotFound, AdapterRejected
from loramux.schema import ModelSchema
from loramux.types import AdapterRef

logger = logging.getLogger(__name__)


def read_adapter(
    name: str,
    folder: str | Path,
    schema: ModelSchema,
    config: LoRAConfig,
    dtype: torch.dtype,
    memory: HostMemory | None = None,
    base: BaseVocabulary | None = None,
    tokenizer: BaseTokenizer | None = None,
) -> tuple[AdapterWeights, BindingReport]:
    """Read the adapter in `folder` for the model that `schema` describes.

    Weights come back on the CPU as the file holds them, fit to be served in `dtype`; of full copies of
    the embedding or the head, the rows that differ from `base`; of a tokenizer, one that differs from
    `tokenizer`, the base model's (None: it is not read). Raises AdapterNotFound when there is no
    such folder, AdapterRejected with every reason when it cannot be served exactly.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise AdapterNotFound(
            f"there is no adapter folder {str(folder)!r}",
            field="lora_path",
            remedy="give the folder that holds adapter_config.json",
        )
    begun = now_s()
    config_identity = _identity(folder / CONFIG_NAME)  # before it is read: then it is never too new
    peft_config, canonical, reasons = read_config(folder)
    tensors, identity, file_reasons = read_header(folder)
    reasons += file_reasons
    bindings = Bindings([], [])
    if peft_config is not None and not file_reasons:
        try:
            bindings, bind_reasons = bind(peft_config, tensors, schema, config, folder)
        except TimeoutError:
            bind_reasons = ["a pattern of adapter_config.json takes too long to match"]
        reasons += bind_reasons
    if reasons or config_identity is None or identity is None:
        raise AdapterRejected(name, reasons or ["its files were replaced while they were read"])
    assert peft_config is not None
    _tell_left_out(name, bindings.left_out)
    rows = bindings.rows()
    bindings, reasons = _with_copies(
        bindings, folder / WEIGHTS_NAME, identity, schema, config, base
    )
    if reasons:
        raise AdapterRejected(name, reasons)
    layout, stored = lay_out(bindings, schema)
    own, reasons = read_own_tokenizer(folder, tokenizer, _vocab_size(layout, schema))
    source = AdapterSource(
        folder / CONFIG_NAME, config_identity, folder / WEIGHTS_NAME, identity, layout, begun
    )
    try:
        buffer = source.read(memory or HostMemory())  # [num_bytes] uint8
    except OSError as error:
        raise AdapterRejected(name, [f"{WEIGHTS_NAME} is damaged or truncated: {error}"]) from error
    reasons += check_values(buffer, stored, dtype, bindings.row_keys, base.dtype if base else dtype)
    reasons += untied(bindings.vocabulary, stored, buffer)
    if reasons:
        raise AdapterRejected(name, reasons)
    ref = AdapterRef(
        name=name,
        digest=digest_of(canonical, buffer, bindings, stored, own.content if own else ""),
        source=str(folder),
        max_r=max((row.r for row in rows), default=1),
        num_bytes=num_elements(layout) * dtype.itemsize,
        invocation=peft_config.invocation,
        tokenizer=own.key if own else "",
        **_beside_lora(bindings, layout, schema),
    )
    return AdapterWeights(ref, buffer, source, tokenizer=own), _report(ref, rows, schema, layout)


def _beside_lora(bindings: Bindings, layout: Layout, schema: ModelSchema) -> dict[str, Any]:
    """What an `AdapterRef` says of towers, of a head, of gains and shifts, and of the vocabulary."""
    vocabulary = layout.vocabulary
    return {
        "adapts_encoder": any(binding.module in schema.towers for binding in bindings),
        "labels": bindings.head.labels if bindings.head else (),
        "affine": bool(bindings.vectors),
        "vocabulary_size": vocabulary.size if vocabulary else 0,
        "vocabulary_rows": vocabulary.num_rows if vocabulary else 0,
    }


def _vocab_size(layout: Layout, schema: ModelSchema) -> int:
    return layout.vocabulary.size if layout.vocabulary else schema.vocab_size


def _tell_left_out(name: str, modules: list[str]) -> None:
    if modules:
        logger.warning(
            "adapter %r is served without its part on towers and connectors: %s",
            name,
            ", ".join(summarise(modules)),
        )


def _with_copies(
    bindings: Bindings,
    path: Path,
    identity: FileIdentity,
    schema: ModelSchema,
    config: LoRAConfig,
    base: BaseVocabulary | None,
) -> tuple[Bindings, list[str]]:
    """`bindings` with what is kept of full copies of the vocabulary, or reasons against them."""
    if bindings.vocabulary is None:
        return bindings, []
    copies, reasons = kept_copies(
        path, identity, bindings.vocabulary, schema.vocabulary, config, base
    )
    if not reasons and not bindings.tensors() and copies.num_rows == 0:
        reasons = ["it is a copy of the base model's vocabulary: the adapter would do nothing"]
    return replace(bindings, copies=copies), reasons


def _identity(path: Path) -> FileIdentity | None:
    try:
        return FileIdentity.of(path.stat())
    except OSError:
        return None  # the reader of the file says why


def _report(
    ref: AdapterRef, rows: list[BindingRow], schema: ModelSchema, layout: Layout
) -> BindingReport:
    bound = {row.module for row in rows}
    lines = () if layout.vocabulary is None else rows_report(layout.vocabulary)
    return BindingReport(
        name=ref.name,
        digest=ref.digest,
        rows=tuple(rows),
        num_modules=len(bound),
        unadapted=tuple(m for m in schema.modules if m not in bound),
        labels=ref.labels,
        invocation=ref.invocation,
        vocabulary=lines,
        own_tokenizer=bool(ref.tokenizer),
    )
