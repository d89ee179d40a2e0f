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


@dataclass(frozen=True, slots=True)
class ModelSchema:
    """Every module that may carry LoRA, and the modules that exist but may not (with the reason)."""

    modules: dict[str, ModuleSpec]
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def elements_per_row(self) -> int:
        """What one rank row costs over all modules: A [in] and B [out] of each."""
        return sum(m.in_features + m.out_features for m in self.modules.values())
