"""What of a model an adapter can bind to, as plain values: no tensors, no names of libraries.

module   `model.layers.0.self_attn.q_proj`: a linear layer as the checkpoint names it
site     `model.layers.0.self_attn.{q_proj,k_proj,v_proj}`: modules that share one input and are
         computed together; each module is one slice of its site
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One linear layer, slice `slice_index` of `site`: y [.., out] = x [.., in] @ W.T."""

    name: str
    in_features: int
    out_features: int
    site: int
    slice_index: int
    experts: int = 0
    """How often the layer is there, once for each expert; 0: it is an ordinary linear layer."""

    transposed: bool = False
    """Whether the base model holds W.T [in, out], as transformers' `Conv1D` does."""


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """The experts of one layer, of which each is down(act(gate(x)) * up(x)).

    In `ModelSchema.modules` stand `<name>.gate_proj`, `<name>.up_proj` and `<name>.down_proj`; or, with
    `shares_a`, `<name>.gate_up_proj`, one slice whose A serves both, its output gate first, then up.
    """

    name: str
    """As the model has it: `model.layers.0.mlp.experts`."""

    num_experts: int
    hidden: int
    inner: int
    shares_a: bool
    interleaved: bool
    """Whether gate and up alternate in the model's own `gate_up_proj`, row by row."""

    per_expert: bool
    """Whether the model's checkpoints have a matrix an expert, and not one tensor for all."""

    aliases: tuple[str, ...] = ()
    """Other names of `name` in adapters: `model.layers.0.block_sparse_moe.experts`."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Its names in `ModelSchema.modules`."""
        parts = ("gate_up_proj",) if self.shares_a else ("gate_proj", "up_proj")
        return tuple(f"{self.name}.{part}" for part in (*parts, "down_proj"))


@dataclass(frozen=True, slots=True)
class VocabularySpec:
    """The input embedding and the output head: `size` rows of `width` each."""

    embedding: str
    """As the model has it: `model.embed_tokens`."""

    head: str
    size: int
    width: int
    tied: bool
    """Whether both are one weight."""

    head_refused: str = ""
    """Why rows of the head cannot be replaced nor adapted, if they cannot."""

    @property
    def modules(self) -> tuple[str, str]:
        return self.embedding, self.head


@dataclass(frozen=True, slots=True)
class ModelSchema:
    """Every module that may carry LoRA, and the modules that exist but may not (with the reason)."""

    modules: dict[str, ModuleSpec]
    refused: dict[str, str] = field(default_factory=dict)
    experts: dict[str, ExpertsSpec] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    """Names that adapters may use for modules, beside the model's own -> the model's own."""

    hidden_size: int = 0
    """D of the final hidden states, which classification heads multiply."""

    labels: tuple[str, ...] = ()
    """What the model's configuration calls its labels."""
    towers: frozenset[str] = frozenset()
    """Those of `modules` and `refused` that are not in the language model, but make vectors of media."""
    vocab_size: int = 0
    """Of the language model; 0: not known."""

    vocabulary: VocabularySpec | None = None
    """None: adapters cannot change it."""

    @property
    def elements_per_row(self) -> int:
        """What one rank row costs over all modules: A [in] and B [out] of each."""
        return sum(
            (m.in_features + m.out_features) * max(1, m.experts) for m in self.modules.values()
        )
