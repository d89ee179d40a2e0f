"""Which tensors of a file belong to what of the model, and every reason against those that do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from loramux.adapters.expert_names import ExpertNames, known_experts, stems
from loramux.adapters.formats import ExpertBinding, ExpertModules, bind_experts
from loramux.adapters.header import (
    WEIGHTS_NAME,
    FileModule,
    FileTensor,
    group,
)
from loramux.adapters.heads import HeadBinding, bind_head, split_heads
from loramux.adapters.invocation import INVOCATION, reasons_of_places
from loramux.adapters.linears import (
    bind_linears,
    forgotten_linears,
    linear_named,
    may_be_left_out,
    unbound,
)
from loramux.adapters.peft_config import PeftConfig
from loramux.adapters.report import Binding, BindingRow, summarise
from loramux.adapters.vectors import VectorBinding, bind_vectors, split_vectors
from loramux.adapters.vocabulary import (
    VocabularyBinding,
    bind_vocabulary,
    split_vocabulary,
)
from loramux.adapters.vocabulary_rows import (
    Copies,
)
from loramux.config import LoRAConfig
from loramux.schema import ModelSchema, ModuleSpec


@dataclass(frozen=True, slots=True)
class Bindings:
    """What of the file goes where."""

    linears: list[Binding]
    experts: list[ExpertBinding]
    vectors: list[VectorBinding] = field(default_factory=list)
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
        every = chain(vocabulary, *(binding.rows for binding in (*self, *self.vectors)))
        return sorted(every, key=lambda row: (row.tensor, row.module))

    @property
    def row_keys(self) -> set[str]:
        """Of tensors that are rows of the vocabulary."""
        return self.vocabulary.row_keys if self.vocabulary else set()

    def tensors(self) -> dict[str, FileTensor]:
        """By key, those that are kept whole."""
        found = {t.key: t for binding in self for t in (binding.a, binding.b)}
        found |= {t.key: t for binding in self.vectors for t in binding.tensors.values()}
        found |= {t.key: t for t in (self.vocabulary.kept if self.vocabulary else ())}
        return found | {t.key: t for t in (self.head.tensors if self.head else ())}


def bind(
    peft: PeftConfig,
    tensors: list[FileTensor],
    schema: ModelSchema,
    config: LoRAConfig,
    folder: Path,
) -> tuple[Bindings, list[str]]:
    """Give each tensor its module; every tensor that finds none is a reason."""
    heads, tensors = split_heads(tensors)
    parts, tensors = split_vocabulary(tensors, schema)
    beside, tensors = split_vectors(tensors)
    bindings, reasons = _bind_layers(peft, tensors, schema, config, alone=not parts)
    adapted = {binding.module for binding in bindings}
    vectors, vector_reasons = bind_vectors(beside, adapted, peft, schema, config)
    head, head_reasons = bind_head(heads, peft, schema, config, folder)
    vocabulary, more_reasons = bind_vocabulary(parts, peft, schema, config)
    bindings = replace(bindings, vectors=vectors, head=head, vocabulary=vocabulary)
    reasons += vector_reasons + head_reasons + more_reasons
    if peft.invocation and parts:
        reasons.append(f"{INVOCATION} with LoRA on the embedding or the output head is not served")
    return bindings, reasons


def _bind_layers(
    peft: PeftConfig,
    tensors: list[FileTensor],
    schema: ModelSchema,
    config: LoRAConfig,
    *,
    alone: bool,
) -> tuple[Bindings, list[str]]:
    """LoRA on the layers; `alone`: the file changes nothing of the vocabulary."""
    if not tensors and alone:
        reason = f"{WEIGHTS_NAME} holds no tensor of LoRA: the adapter would do nothing"
        return Bindings([], []), [reason]
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
    bindings = Bindings(linear, of_experts, left_out=left_out)
    in_towers = [binding.module for binding in bindings if binding.module in schema.towers]
    reasons += reasons_of_places(peft.invocation, schema.vocab_size, bool(experts), in_towers)
    return bindings, reasons + _no_parameter(peft, schema)


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
