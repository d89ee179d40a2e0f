"""A PEFT folder in, weights and a binding report out, or one refusal with every reason.

Nothing is allocated before the header has been checked against the model: names, shapes, ranks and
data types first, bytes last.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch

from loramux.adapters.expert_names import ExpertNames, known_experts, stems
from loramux.adapters.formats import ExpertBinding, ExpertModules, bind_experts, stored_experts
from loramux.adapters.header import (
    FLOATS,
    WEIGHTS_NAME,
    FileModule,
    FileTensor,
    group,
    read_header,
)
from loramux.adapters.heads import HeadBinding, bind_head, split_heads
from loramux.adapters.host_cache import HostMemory
from loramux.adapters.linears import (
    bind_linears,
    forgotten_linears,
    linear_named,
    may_be_left_out,
    unbound,
)
from loramux.adapters.peft_config import CONFIG_NAME, PeftConfig, read_config
from loramux.adapters.report import Binding, BindingReport, BindingRow, summarise
from loramux.adapters.values import check_values
from loramux.adapters.vocabulary import (
    VocabularyBinding,
    bind_vocabulary,
    split_vocabulary,
)
from loramux.adapters.vocabulary_rows import (
    BaseVocabulary,
    Copies,
    kept_copies,
    pieces_of,
    rows_report,
    stored_vocabulary,
    untied,
)
from loramux.adapters.weights import (
    AdapterSource,
    AdapterWeights,
    FileIdentity,
    Layout,
    Stored,
    StoredPair,
    now_s,
    place,
)
from loramux.config import LoRAConfig
from loramux.errors import AdapterNotFound, AdapterRejected
from loramux.schema import ModelSchema, ModuleSpec
from loramux.types import AdapterRef

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Bindings:
    """What of the file goes where."""

    linears: list[Binding]
    experts: list[ExpertBinding]
    head: HeadBinding | None = None
    vocabulary: VocabularyBinding | None = None
    copies: Copies = field(default_factory=Copies)
    left_out: list[str] = field(default_factory=list)  # modules of the file that are not served

    def __iter__(self) -> Iterator[Binding]:
        yield from self.linears
        yield from self.experts

    def rows(self) -> list[BindingRow]:
        """By tensor."""
        vocabulary = self.vocabulary.rows if self.vocabulary else []
        every = chain(vocabulary, chain.from_iterable(binding.rows for binding in self))
        return sorted(every, key=lambda row: (row.tensor, row.module))

    @property
    def row_keys(self) -> set[str]:
        """Of tensors that are rows of the vocabulary."""
        return self.vocabulary.row_keys if self.vocabulary else set()

    def tensors(self) -> dict[str, FileTensor]:
        """By key, those that are kept whole."""
        found = {t.key: t for binding in self for t in (binding.a, binding.b)}
        found |= {t.key: t for t in (self.vocabulary.kept if self.vocabulary else ())}
        return found | {t.key: t for t in (self.head.tensors if self.head else ())}


def read_adapter(
    name: str,
    folder: str | Path,
    schema: ModelSchema,
    config: LoRAConfig,
    dtype: torch.dtype,
    memory: HostMemory | None = None,
    base: BaseVocabulary | None = None,
) -> tuple[AdapterWeights, BindingReport]:
    """Read the adapter in `folder` for the model that `schema` describes.

    Weights come back on the CPU as the file holds them, fit to be served in `dtype`; of full copies of
    the embedding or the head, the rows that differ from `base`. Raises AdapterNotFound when there is no
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
    bindings = _Bindings([], [])
    if peft_config is not None and not file_reasons:
        try:
            bindings, bind_reasons = _bind(peft_config, tensors, schema, config, folder)
        except TimeoutError:
            bind_reasons = ["a pattern of adapter_config.json takes too long to match"]
        reasons += bind_reasons
    if reasons or config_identity is None or identity is None:
        raise AdapterRejected(name, reasons or ["its files were replaced while they were read"])
    _tell_left_out(name, bindings.left_out)
    rows = bindings.rows()
    bindings, reasons = _with_copies(
        bindings, folder / WEIGHTS_NAME, identity, schema, config, base
    )
    if reasons:
        raise AdapterRejected(name, reasons)
    layout, stored = _lay_out(bindings, schema)
    source = AdapterSource(
        folder / CONFIG_NAME, config_identity, folder / WEIGHTS_NAME, identity, layout, begun
    )
    try:
        buffer = source.read(memory or HostMemory())  # [num_bytes] uint8
    except OSError as error:
        raise AdapterRejected(name, [f"{WEIGHTS_NAME} is damaged or truncated: {error}"]) from error
    reasons = check_values(buffer, stored, dtype, bindings.row_keys, base.dtype if base else dtype)
    reasons += untied(bindings.vocabulary, stored, buffer)
    if reasons:
        raise AdapterRejected(name, reasons)
    ref = AdapterRef(
        name=name,
        digest=_digest(canonical, buffer, bindings, stored),
        source=str(folder),
        max_r=max((row.r for row in rows), default=1),
        num_bytes=_num_elements(layout) * dtype.itemsize,
        adapts_encoder=any(binding.module in schema.towers for binding in bindings),
        labels=bindings.head.labels if bindings.head else (),
        vocabulary_size=layout.vocabulary.size if layout.vocabulary else 0,
        vocabulary_rows=layout.vocabulary.num_rows if layout.vocabulary else 0,
    )
    return AdapterWeights(ref, buffer, source), _report(ref, rows, schema, layout)


def _tell_left_out(name: str, modules: list[str]) -> None:
    if modules:
        logger.warning(
            "adapter %r is served without its part on towers and connectors: %s",
            name,
            ", ".join(summarise(modules)),
        )


def _with_copies(
    bindings: _Bindings,
    path: Path,
    identity: FileIdentity,
    schema: ModelSchema,
    config: LoRAConfig,
    base: BaseVocabulary | None,
) -> tuple[_Bindings, list[str]]:
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
        vocabulary=lines,
    )


def _bind(
    peft: PeftConfig,
    tensors: list[FileTensor],
    schema: ModelSchema,
    config: LoRAConfig,
    folder: Path,
) -> tuple[_Bindings, list[str]]:
    """Give each tensor its module; every tensor that finds none is a reason."""
    heads, tensors = split_heads(tensors)
    parts, tensors = split_vocabulary(tensors, schema)
    bindings, reasons = _bind_layers(peft, tensors, schema, config, alone=not parts)
    head, head_reasons = bind_head(heads, peft, schema, config, folder)
    vocabulary, more_reasons = bind_vocabulary(parts, peft, schema, config)
    bindings = replace(bindings, head=head, vocabulary=vocabulary)
    return bindings, reasons + head_reasons + more_reasons


def _bind_layers(
    peft: PeftConfig,
    tensors: list[FileTensor],
    schema: ModelSchema,
    config: LoRAConfig,
    *,
    alone: bool,
) -> tuple[_Bindings, list[str]]:
    """LoRA on the layers; `alone`: the file changes nothing of the vocabulary."""
    if not tensors and alone:
        reason = f"{WEIGHTS_NAME} holds no tensor of LoRA: the adapter would do nothing"
        return _Bindings([], []), [reason]
    modules, reasons = group(sorted(tensors, key=lambda t: t.key))
    names, experts = ExpertNames(schema), ExpertModules()
    linears: list[tuple[FileModule, ModuleSpec]] = []
    left_out: list[str] = []
    for module in modules:
        if spec := linear_named(module.name, schema):
            linears.append((module, spec))
            continue
        if may_be_left_out(module.name, schema, config):
            left_out.append(module.name)
            continue
        found = names.find(module.name)
        if found is None or isinstance(found, str):
            reasons += [
                unbound(tensor, module, found, schema) for tensor in module.factors.values()
            ]
        else:
            experts.add(module, found)
    strangers = any("expert" in reason for reason in reasons)
    reasons = summarise(reasons) + ([known_experts(schema)] if strangers else [])
    linear, linear_reasons = bind_linears(linears, peft, schema, config)
    of_experts, expert_reasons = bind_experts(experts, peft, schema, config)
    reasons += linear_reasons + expert_reasons
    if linears or experts or not alone:
        reasons += forgotten_linears([spec.name for _, spec in linears], peft, schema, config)
    elif left_out:
        reasons.append("all of it is on towers and connectors: nothing would be left to serve")
    return _Bindings(linear, of_experts, left_out=left_out), reasons + _no_parameter(peft, schema)


def _no_parameter(peft: PeftConfig, schema: ModelSchema) -> list[str]:
    """The reason when `target_parameters` names nothing that is here."""
    if not peft.target_parameters:
        return []
    modules = chain(schema.modules, schema.refused, schema.aliases)
    experts = chain.from_iterable(stems(spec) for spec in schema.experts.values())
    parameters = chain(
        (f"{module}.weight" for module in modules),
        (f"{stem}.{leaf}" for stem in experts for leaf in ("gate_up_proj", "down_proj")),
    )
    if any(peft.targets_parameter(parameter) for parameter in parameters):
        return []
    named = ", ".join(sorted(peft.target_parameters)[:8])
    return [f"target_parameters ({named}) match nothing here; {known_experts(schema)}"]


def _lay_out(bindings: _Bindings, schema: ModelSchema) -> tuple[Layout, dict[str, Stored]]:
    """Where everything goes in the buffer: by module, and by the tensor's key."""
    vocabulary = bindings.vocabulary
    later = {t.key for t in vocabulary.kept} if vocabulary else set[str]()
    pieces = [(t.key in later, t.start, t.num_bytes, t) for t in bindings.tensors().values()]
    for tensor in vocabulary.compared if vocabulary else ():
        found = pieces_of(tensor, bindings.copies.ids[tensor.key])
        pieces += [(True, start, size, tensor) for start, size in found]
    pieces.sort(key=lambda piece: piece[:2])
    offsets, runs = place((start, size, FLOATS[t.dtype].itemsize) for _, start, size, t in pieces)
    stored: dict[str, Stored] = {}
    for (_, _, size, tensor), offset in zip(pieces, offsets, strict=True):
        width, dtype = tensor.shape[-1], FLOATS[tensor.dtype]
        rows = size // (width * dtype.itemsize)
        if (before := stored.get(tensor.key)) is not None:  # the rows of a copy lie together
            offset, rows = before.offset, before.rows + rows
        stored[tensor.key] = Stored(offset, rows, width, dtype)
    pairs = {
        binding.module: StoredPair(stored[binding.a.key], stored[binding.b.key], binding.scale)
        for binding in sorted(bindings.linears, key=lambda binding: binding.module)
    }
    experts = stored_experts(bindings.experts, stored)
    head = bindings.head.stored(stored) if bindings.head else None
    own = None
    if vocabulary is not None and schema.vocabulary is not None:
        ends = [
            at + size for (late, _, size, _), at in zip(pieces, offsets, strict=True) if not late
        ]
        spec, start = schema.vocabulary, max(ends, default=0)
        own = stored_vocabulary(vocabulary, bindings.copies, spec, stored, start)
    return Layout(pairs, tuple(runs), experts, head, own), stored


def _num_elements(layout: Layout) -> int:
    """Of all factors, and of rows of the vocabulary, as the pool holds them."""
    pairs = list(layout.pairs.values())
    stored = []
    if (vocabulary := layout.vocabulary) is not None:
        pairs += vocabulary.loras.values()
        stored = [part.rows for part in (*vocabulary.embedding, *vocabulary.head)]
    stored += [factor for pair in pairs for factor in (pair.a, pair.b)]
    return sum(one.rows * one.columns for one in stored) + sum(
        experts.num_elements for experts in layout.experts.values()
    )


def _digest(
    canonical: bytes, buffer: torch.Tensor, bindings: _Bindings, stored: Mapping[str, Stored]
) -> str:
    """SHA-256 over the configuration and the names, types, shapes and stored bytes of the tensors."""
    digest = hashlib.sha256(canonical)
    data = buffer.numpy().data
    for key, tensor in sorted(bindings.tensors().items()):
        place = stored[key]
        digest.update(f"{key}|{tensor.dtype}|{tensor.shape}".encode())
        digest.update(data[place.offset : place.offset + place.num_bytes])
    for key, copy in sorted(bindings.copies.digests.items()):
        digest.update(f"{key}|{copy}".encode())
    if bindings.head:
        digest.update(json.dumps(bindings.head.labels).encode())
    return digest.hexdigest()
