"""What of a PEFT adapter changes the model's vocabulary, checked: names, shapes, tokens, data types.

    <embedding>.lora_embedding_A [r, V'], .lora_embedding_B [D, r]    LoRA on the input embedding
    <head>.lora_A.weight [r, D], .lora_B.weight [V', r]               LoRA on the output head
    <module>.token_adapter.trainable_tokens_delta [n, D]              rows of trainable_token_indices
    <module>.weight [V', D]                                           a full copy: of modules_to_save, or
    <module>.base_layer.weight [V', D] and others, see BASES          of the base model, maybe resized

PEFT loads a copy of the base model into the base model. Where the embedding is the head as well (tied
weights), both change with it; what modules_to_save or trainable tokens do to the other one is in
`_tables` and `_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from loramux.adapters.header import FLOATS, PREFIX, FileTensor
from loramux.adapters.peft_config import PeftConfig
from loramux.adapters.report import Binding, BindingRow
from loramux.config import LoRAConfig
from loramux.schema import ModelSchema, VocabularySpec

TOKENS = ".token_adapter.trainable_tokens_delta"
COPY = ".weight"
BASES = (".base_layer.weight", ".token_adapter.base_layer.weight", ".original_module.weight")
ECHO = ".modules_to_save.weight"  # saved beside COPY of a resized model; PEFT does not load it
EMBEDDING_FACTORS = {".lora_embedding_A": "A", ".lora_embedding_B": "B"}
HEAD_FACTORS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
NOT_SAVED = (
    "fully trained modules are not served yet, but for the classification head (score or classifier) "
    "of task_type SEQ_CLS, the input embedding and the output head"
)

Parts = dict[str, dict[str, FileTensor]]
"""Tensors by module, as the model calls it, and end of their name."""


@dataclass(frozen=True, slots=True)
class VocabularyBinding:
    """What of the file changes the vocabulary, by module: the model's embedding or its head."""

    size: int
    """Tokens of the vocabulary that the adapter was trained with."""

    copies: dict[str, FileTensor] = field(default_factory=dict)
    equal: tuple[tuple[FileTensor, FileTensor], ...] = ()
    """Copies of one weight, which must not differ."""

    tokens: dict[str, tuple[tuple[int, ...], FileTensor]] = field(default_factory=dict)
    lora: dict[str, Binding] = field(default_factory=dict)
    ties_lora: bool = False
    """Whether LoRA on embedding and head is one: A of the one is B of the other, transposed."""

    @property
    def kept(self) -> list[FileTensor]:
        """Tensors that are kept whole."""
        lora = (t for binding in self.lora.values() for t in (binding.a, binding.b))
        return [*{t.key: t for _, t in self.tokens.values()}.values(), *lora]

    @property
    def compared(self) -> list[FileTensor]:
        """Copies that are held against the base model, each once."""
        found = [*self.copies.values(), *(t for pair in self.equal for t in pair)]
        return list({t.key: t for t in found}.values())

    @property
    def row_keys(self) -> set[str]:
        """Of the tensors that are no LoRA."""
        return {t.key for t in self.compared} | {t.key for _, t in self.tokens.values()}

    @property
    def rows(self) -> list[BindingRow]:
        """Of its LoRA, for the report."""
        return [row for binding in self.lora.values() for row in binding.rows]


def split_vocabulary(
    tensors: Iterable[FileTensor], schema: ModelSchema
) -> tuple[Parts, list[FileTensor]]:
    """(those that change the vocabulary, the others)."""
    parts: Parts = {}
    others: list[FileTensor] = []
    for tensor in tensors:
        module, end = _place_of(tensor.key, schema)
        if module:
            parts.setdefault(module, {})[end] = tensor
        else:
            others.append(tensor)
    return parts, others


def bind_vocabulary(
    parts: Parts, peft: PeftConfig, schema: ModelSchema, config: LoRAConfig
) -> tuple[VocabularyBinding | None, list[str]]:
    """What `parts` do to the vocabulary, if anything, or every reason against it."""
    spec = schema.vocabulary
    names = [*peft.saved_modules, *filter(None, peft.token_indices)]
    if spec is None:
        why = "its input embedding and its output head are of no kind that adapters are served on"
        strangers = [f"modules_to_save={name!r}: {NOT_SAVED}" for name in peft.saved_modules]
        tokens = [f"trainable_token_indices: {why}"] if peft.token_indices else []
        return None, strangers[:1] + tokens
    found = _Binder(spec, peft, schema, config, parts)
    reasons = [*found.strangers(names), *found.missing(), *found.wrong()]
    if reasons or not parts:
        return None, reasons
    binding = found.binding()
    reasons = list(found.conflicts(binding))
    return (None if reasons else binding), reasons


def _place_of(key: str, schema: ModelSchema) -> tuple[str, str]:
    """(module, end of the name) of a tensor; empty where it is none of these."""
    spec = schema.vocabulary
    if spec is None or not key.startswith(PREFIX):
        return "", ""
    for end in (*EMBEDDING_FACTORS, *HEAD_FACTORS, TOKENS, *BASES, ECHO, COPY):
        if not key.endswith(end):
            continue
        name = key[len(PREFIX) : -len(end)]
        module = schema.aliases.get(name, name)
        if module in spec.modules and not (
            (module == spec.head and end in EMBEDDING_FACTORS)
            or (module == spec.embedding and end in HEAD_FACTORS)
        ):
            return module, end
    return "", ""


class _Binder:
    """The parts of one file held against one model."""

    def __init__(
        self,
        spec: VocabularySpec,
        peft: PeftConfig,
        schema: ModelSchema,
        config: LoRAConfig,
        parts: Parts,
    ):
        self._spec = spec
        self._peft = peft
        self._schema = schema
        self._config = config
        self._parts = parts
        self._names = {
            module: [module, *(a for a, name in schema.aliases.items() if name == module)]
            for module in spec.modules
        }
        self._saved = [
            m for m in spec.modules if any(self._means(n, m) for n in peft.saved_modules)
        ]
        self._ids = self._listed_tokens()
        self._ties = spec.tied and not peft.saved_heads

    # --- what the configuration says -----------------------------------------------------------

    def _means(self, name: str, module: str) -> bool:
        """Whether a configuration that says `name` means `module`, as PEFT matches it."""
        return any(known.endswith(name) for known in self._names[module]) if name else False

    def _listed_tokens(self) -> dict[str, tuple[int, ...]]:
        found = {}
        for name, ids in self._peft.token_indices.items():
            for module in self._spec.modules:
                if ids and (
                    self._means(name, module) or (not name and module == self._spec.embedding)
                ):
                    found[module] = ids
        return found

    def strangers(self, names: Sequence[str]) -> Iterator[str]:
        """Names of modules that are neither the embedding nor the head."""
        for name in names:
            if not any(self._means(name, module) for module in self._spec.modules):
                key = (
                    "modules_to_save"
                    if name in self._peft.saved_modules
                    else "trainable_token_indices"
                )
                yield f"{key}={name[:80]!r}: {NOT_SAVED}"

    def _own_tokens(self) -> dict[str, tuple[int, ...]]:
        """Of the modules whose rows are in the file: those of a tied head are the embedding's."""
        spec, ids = self._spec, self._ids
        shared = self._ties and ids.get(spec.head) == ids.get(spec.embedding)
        return {m: v for m, v in ids.items() if not (shared and m == spec.head)}

    def missing(self) -> Iterator[str]:
        """What the configuration has and the file lacks, or the other way round."""
        for module in self._saved:
            if COPY not in self._parts.get(module, {}):
                yield f"modules_to_save has {module}, but the file has no {module}{COPY}"
        own = self._own_tokens()
        for module in own:
            if TOKENS not in self._parts.get(module, {}):
                yield f"trainable_token_indices has tokens of {module}, but the file has no rows of them"
        for module in self._spec.modules:
            here = self._parts.get(module, {})
            if TOKENS in here and module not in own and not self._ties:
                yield f"{here[TOKENS].key} is in the file, but trainable_token_indices does not name it"
            if ECHO in here and COPY not in here:
                yield f"{here[ECHO].key} is a name that PEFT does not load; save it with save_pretrained"
            yield from self._missing_lora(module)

    def _missing_lora(self, module: str) -> Iterator[str]:
        halves = self._factors(module)
        targeted = self._is_targeted(module)
        if len(halves) == 1:
            yield f"{module} has LoRA's {next(iter(halves))} but not its other half"
        refused = self._schema.refused.get(module)
        if halves and refused and any(self._peft.targets(name) for name in self._names[module]):
            return  # what the configuration targets in vain is a reason already
        if halves and refused:
            yield f"{module}: {refused}"
        elif halves and not targeted:
            yield f"{module} has LoRA in the file, but the configuration does not target it"
        elif not halves and not refused and targeted:
            yield f"the configuration targets {module}, but the file has no tensors for it"

    def _is_targeted(self, module: str) -> bool:
        if self._peft.targets_all_linear:  # neither embeddings nor the output head
            return False
        if module == self._spec.head and self._peft.saved_heads:
            return False  # a sequence classifier has none
        named = any(self._peft.targets(name) for name in self._names[module])
        return named or (module == self._spec.head and self._is_tied_target(module))

    def _is_tied_target(self, module: str) -> bool:
        """Whether a head has LoRA because its embedding has."""
        tying = self._ties and self._peft.ensures_tying and module == self._spec.head
        return tying and any(self._peft.targets(n) for n in self._names[self._spec.embedding])

    # --- tensors -------------------------------------------------------------------------------

    def _factors(self, module: str) -> dict[str, FileTensor]:
        ends = EMBEDDING_FACTORS if module == self._spec.embedding else HEAD_FACTORS
        here = self._parts.get(module, {})
        return {factor: here[end] for end, factor in ends.items() if end in here}

    def _tables(self) -> tuple[dict[str, FileTensor], list[tuple[FileTensor, FileTensor]]]:
        """The copy that each module's rows come from; and copies that are of one weight."""
        spec = self._spec
        saved = {m: here[COPY] for m in self._saved if COPY in (here := self._parts.get(m, {}))}
        bases: dict[str, list[FileTensor]] = {}
        for module in spec.modules:
            here = self._parts.get(module, {})
            ends = BASES if module in self._saved else (*BASES, COPY)
            bases[module] = [here[end] for end in ends if end in here]
        equal: list[tuple[FileTensor, FileTensor]] = []
        if self._ties and self._peft.ensures_tying and spec.embedding in self._saved:
            copy = self._parts.get(spec.head, {}).get(COPY) or saved.get(spec.embedding)
            own = saved.get(spec.embedding) or copy
            if copy is not None and own is not None:
                equal.append((own, copy))
                return dict.fromkeys(spec.modules, own), equal
        tables = dict(saved)
        groups = [list(spec.modules)] if self._ties else [[m] for m in spec.modules]
        for group in groups:
            unsaved = [module for module in group if module not in saved]
            copies = [tensor for module in group for tensor in bases[module]]
            if unsaved and copies:
                tables |= dict.fromkeys(unsaved, copies[-1])
                equal += [(copies[-1], other) for other in copies[:-1]]
        return tables, equal

    def wrong(self) -> Iterator[str]:
        """Reasons against tensors, by their headers alone."""
        spec, r_most = self._spec, self._config.max_lora_rank
        for module in spec.modules:
            here = self._parts.get(module, {})
            for end, tensor in here.items():
                if tensor.dtype not in FLOATS:
                    yield f"{tensor.key} has dtype {tensor.dtype}; F32, F16 and BF16 are served"
                    continue
                shape = self._expected(module, end, tensor)
                if len(tensor.shape) != 2 or any(
                    size < 1 or wanted not in (None, size)
                    for size, wanted in zip(tensor.shape, shape, strict=True)
                ):
                    said = ["any" if n is None else n for n in shape]
                    yield f"{tensor.key} has shape {list(tensor.shape)}, expected {said}"
            if self._factors(module) and (r := self._r(module)) > r_most:
                yield (
                    f"{module} has rank {r}, larger than max_lora_rank {r_most}; "
                    f"start with --max-lora-rank {r}"
                )
        if self._parts.get(spec.head) and self._peft.saved_heads:
            yield f"{spec.head} is adapted, and a sequence classifier has no output head"
        elif self._parts.get(spec.head) and spec.head_refused:
            yield f"{spec.head}: {spec.head_refused}"

    def _r(self, module: str) -> int:
        return self._peft.r_and_scale_of(self._name(module))[0]

    def _name(self, module: str) -> str:
        """As the file calls it."""
        key = next(iter(self._factors(module).values())).key.removeprefix(PREFIX)
        return next((name for name in self._names[module] if key.startswith(f"{name}.")), module)

    def _expected(self, module: str, end: str, tensor: FileTensor) -> tuple[int | None, int | None]:
        """The shape, None where any number will do."""
        width = self._spec.width
        if end == TOKENS:
            ids = self._ids.get(module) or self._ids.get(self._spec.embedding) or ()
            return len(ids), width
        if end in EMBEDDING_FACTORS:
            r = self._r(module)
            return (r, None) if end.endswith("A") else (width, r)
        if end in HEAD_FACTORS:
            r = self._r(module)
            return (r, width) if ".lora_A." in end else (None, r)
        return None, width

    # --- what it is together -------------------------------------------------------------------

    def binding(self) -> VocabularyBinding:
        """Of tensors that nothing speaks against."""
        spec = self._spec
        copies, equal = self._tables()
        own = self._own_tokens()
        tokens = {module: (ids, self._parts[module][TOKENS]) for module, ids in own.items()}
        if self._ties and spec.embedding in tokens and spec.head not in tokens:
            tokens[spec.head] = tokens[spec.embedding]
        lora = {}
        for module in spec.modules:
            if len(factors := self._factors(module)) == 2:
                r, scale = self._peft.r_and_scale_of(self._name(module))
                lora[module] = Binding(module, factors["A"], factors["B"], r, scale)
        sizes = self._sizes(copies.values(), lora)
        size = sizes.pop() if len(sizes) == 1 else spec.size
        ties = self._ties and self._peft.ensures_tying and len(lora) == 2
        return VocabularyBinding(size, copies, tuple(equal), tokens, lora, ties)

    def _sizes(self, copies: Iterable[FileTensor], lora: dict[str, Binding]) -> set[int]:
        found = {tensor.shape[0] for tensor in copies}
        if self._spec.embedding in lora:
            found.add(lora[self._spec.embedding].a.shape[1])
        if self._spec.head in lora:
            found.add(lora[self._spec.head].b.shape[0])
        return found

    def conflicts(self, binding: VocabularyBinding) -> Iterator[str]:
        """What does not go together, and what would be needed and is not there."""
        spec = self._spec
        sizes = self._sizes((t for t in binding.compared), binding.lora)
        if len(sizes) > 1:
            listed = ", ".join(map(str, sorted(sizes)))
            yield f"its parts have vocabularies of different sizes: {listed}"
            return
        for module, (ids, tensor) in binding.tokens.items():
            if outside := [i for i in ids if i >= binding.size]:
                yield (
                    f"{tensor.key}: token {outside[0]} is outside the vocabulary of {binding.size}; "
                    "rows that were added must be in the file whole (save_embedding_layers=True)"
                )
            if module in binding.lora or module in self._saved:
                yield f"{module} has trained tokens and is adapted otherwise: PEFT cannot load that"
        for module in binding.lora:
            if module in self._saved:
                yield f"{module} is in modules_to_save and has LoRA: PEFT cannot load that"
        needed = [spec.embedding] if self._peft.saved_heads else list(spec.modules)
        if binding.size > spec.size:
            for module in needed:
                if module not in binding.copies:
                    yield (
                        f"its vocabulary has {binding.size} tokens and the model's {spec.size}, but the "
                        f"file lacks the rows of {module}; save it with save_embedding_layers=True"
                    )
        if binding.ties_lora:
            embedding, head = binding.lora[spec.embedding], binding.lora[spec.head]
            if (embedding.r, embedding.scale) != (head.r, head.scale):
                yield f"{spec.head} is tied to the embedding, but has another rank or scale"
