"""Entering a stock transformers model: its linear layers wrapped, its attention paged, nothing copied.

`attach` replaces every plain `nn.Linear` by slices of `MergedLinear`s and gives each attention module
its part of the KV cache. `probe` then runs three tokens through the model's own forward and believes
only what it saw: a layer whose attention did not come through the registry would keep state that we
do not have, so such a model is refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from loramux.adapters.heads import labels_of
from loramux.config import LoRAConfig
from loramux.errors import LoramuxError, UnsupportedModel
from loramux.layers.attention import PagedAttention, attention_function
from loramux.layers.batch import Overlay, StepBatch
from loramux.layers.experts import Experts
from loramux.layers.linear import LinearSlice, MergedLinear
from loramux.layers.sharded import ShardedLinear
from loramux.layers.tower import TowerLinear, TowerSlice, TowerStep
from loramux.models.conv1d import replace_conv1d
from loramux.models.experts import (
    AttachedExperts,
    attach_experts,
    attach_routers,
    detach_router,
    module_specs,
)
from loramux.models.layers import FusedDecoder
from loramux.models.multimodal import Language, is_in, let_see_both_ways, linears_in
from loramux.models.names import aliases_of, old_names
from loramux.models.norms import fuse_norms
from loramux.models.shards import Shards
from loramux.models.tower_attention import attend_in_segments
from loramux.models.towers import Towers
from loramux.models.vocabulary import find_vocabulary, lora_refusals
from loramux.parallel import ALONE, Group
from loramux.schema import ModelSchema, ModuleSpec

logger = logging.getLogger(__name__)

ATTENTION_NAME = "loramux_paged"
LEFT_OUT = "this deployment's target_modules leave it out"
TOWERS_OFF = (
    "adapters on towers and connectors are served with --enable-tower-connector-lora only "
    "(enable_tower_connector_lora is off)"
)

# Children of one module that share their input in every architecture we know; the probe checks it.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
)

# Types of layers that compress or choose keys, which may show only in contexts longer than the proof's.
OTHER_KEYS = {
    "chunked_attention",
    "compressed_sparse_attention",
    "deepseek_sparse_attention",
    "heavily_compressed_attention",
    "minimax_m3_sparse",
    "qwen_sparse_attention",
}


@dataclass(slots=True)
class Attached:
    """A model as the runner uses it. `sites[i]` is the layer that `ModuleSpec.site == i` names; behind
    them come two for each of `experts`."""

    model: PreTrainedModel
    batch: StepBatch
    sites: list[MergedLinear]
    attentions: list[PagedAttention]
    schema: ModelSchema
    head: MergedLinear | None = None
    names: dict[str, tuple[MergedLinear, int]] = field(default_factory=dict)
    experts: list[Experts] = field(default_factory=list)
    decoder: FusedDecoder | None = None  # what runs instead of the model's own forward
    shards: Shards = field(default_factory=lambda: Shards(ALONE))
    language: Language | None = None  # where it is a part of `model`
    towers: Towers | None = None  # the other parts
    transposed: frozenset[str] = frozenset()  # linear layers that were `Conv1D`

    @property
    def group(self) -> Group:
        return self.shards.group

    @property
    def device(self) -> torch.device:
        return self.model.device

    def own_forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        keep: torch.Tensor | None = None,
        overlay: Overlay | None = None,
    ) -> torch.Tensor:
        """Tokens [T] at `positions`, [T] or in three dimensions [3, T], through the model's own forward
        -> logits [B, V] of rows `keep` [B], or of all where that is None. Media stand in `overlay`."""
        if self.language is not None:
            return self.language.forward(ids, positions.long(), keep, overlay)
        assert overlay is None, "media for a model without towers. This is a bug."
        output = self.model(
            input_ids=ids.unsqueeze(0),
            position_ids=positions.long().unsqueeze(-2),  # [1, T] or [3, 1, T]
            use_cache=False,
            **({} if keep is None else {"logits_to_keep": keep.long()}),
        )
        logits: torch.Tensor = output.logits
        return logits[0]  # [B, V]


def register_attention() -> None:
    """Make `attn_implementation="loramux_paged"` known to transformers; harmless when repeated."""
    AttentionInterface.register(ATTENTION_NAME, attention_function)


def attach(
    model: PreTrainedModel, lora: LoRAConfig | None, shards: Shards | None = None
) -> Attached:
    """Wrap `model`, of which `shards` says what this rank holds, in place.

    Raises UnsupportedModel, naming what stands in the way."""
    batch, step = StepBatch(), TowerStep()
    attached = Attached(model, batch, [], [], ModelSchema({}), shards=shards or Shards(ALONE))
    attached.transposed = replace_conv1d(model)
    attached.language = Language.of(model)
    outside = [] if attached.language is None else attached.language.outside()
    for path, parent in list(model.named_modules()):
        for group in _groups(parent):
            if is_in(_join(path, group[0]), outside):
                continue
            for names in _alike(path, group, attached.shards):
                _merge(parent, path, names, attached)
    attentions = _attach_attention(model, batch, outside)
    let_see_both_ways(model, outside)
    fuse_norms(model if attached.language is None else attached.language.decoder)
    adapted = lora is not None and lora.enable_tower_connector_lora
    if attached.language is not None:
        attend_in_segments(model, attached.language.decoder)
        attached.towers = Towers(model, attached.language, step, adapted=adapted)
        if adapted:
            _wrap_towers(attached, outside, step)
    elif adapted:
        logger.info("%s has no towers: LoRA on them means nothing", type(model).__name__)
    found = attach_experts(model, batch, lora, attached.shards)
    routers = attach_routers(model, batch, found)
    attached.names |= {name: (linear, 0) for name, linear in routers.items()}
    probe(attached)
    _split_unshared(attached)
    idle = [name for name, linear in routers.items() if not linear.computations]
    for name in idle:
        detach_router(model, name)
        del attached.names[name]
    attached.attentions = _used(model, attentions)
    _build_schema(attached, lora, found, outside)
    attached.schema.refused.update(dict.fromkeys(idle, "this router's product is not served"))
    return attached


def probe(attached: Attached) -> None:
    """Three tokens through the whole model, without a cache: shapes, and who shares an input."""
    model = attached.model
    ids = torch.zeros(3, dtype=torch.long, device=model.device)  # [3]
    positions = torch.arange(3, device=model.device)  # [3]
    try:
        with torch.inference_mode():
            logits = attached.own_forward(ids, positions, torch.tensor([2], device=model.device))
    except LoramuxError:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot run behind loramux's attention: "
            f"{type(error).__name__}: {error}",
            field="model",
        ) from error
    if len(logits) != 1:
        raise UnsupportedModel(
            f"{type(model).__name__} ignores logits_to_keep: it returned logits of "
            f"{len(logits)} positions where one was asked for",
            field="model",
        )


def _groups(parent: nn.Module) -> Iterator[list[str]]:
    """Names of plain linear children, those that share an input together."""
    plain = {name: child for name, child in parent.named_children() if type(child) is nn.Linear}
    for siblings in SIBLINGS:
        found = [plain.get(name) for name in siblings]
        present = [linear for linear in found if linear is not None]
        if len(present) == len(siblings) and len({linear.in_features for linear in present}) == 1:
            yield list(siblings)
            for name in siblings:
                del plain[name]
    for name in plain:
        yield [name]


def _alike(path: str, group: list[str], shards: Shards) -> Iterator[list[str]]:
    """`group` whole if its layers are cut along the output, or not at all, else each alone."""
    cuts = [shards.cuts.get(_join(path, name)) for name in group]
    kinds = {(cut.kind, cut.outside) for cut in cuts if cut is not None}
    if not kinds or (len(kinds) == 1 and kinds <= {("whole", False), ("column", False)}):
        yield group
    else:
        yield from ([name] for name in group)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _merge(parent: nn.Module, path: str, group: list[str], attached: Attached) -> None:
    names = [_join(path, name) for name in group]
    merged = _linear([getattr(parent, name) for name in group], names, attached)
    for index, name in enumerate(group):
        setattr(parent, name, LinearSlice(merged, index))
        attached.names[names[index]] = (merged, index)


def _wrap_towers(attached: Attached, outside: list[str], step: TowerStep) -> None:
    """Let every plain linear layer outside the language model carry adapters."""
    for name, linear in list(linears_in(attached.model, outside)):
        merged = TowerLinear(linear, step)
        attached.model.set_submodule(name, TowerSlice(merged, 0))
        attached.names[name] = (merged, 0)


def _linear(linears: list[nn.Linear], names: list[str], attached: Attached) -> MergedLinear:
    """`linears`, called `names`, as one."""
    shards = attached.shards
    if shards.group.size == 1:
        return MergedLinear(linears, attached.batch)
    cuts = [shards.cuts[name] for name in names]
    return ShardedLinear(linears, attached.batch, cuts, shards.group, fully=shards.fully)


def _attach_attention(
    model: PreTrainedModel, batch: StepBatch, outside: list[str]
) -> list[PagedAttention]:
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if odd := sorted(OTHER_KEYS.intersection(types)):
        raise UnsupportedModel(
            f"{type(model).__name__} is not served: its layers of the types {', '.join(odd)} attend to "
            "other keys than those of the tokens before",
            field="model",
        )
    attentions = []
    for name, module in model.named_modules():
        if is_in(name, outside):
            continue
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal"):
            if not module.is_causal:
                raise UnsupportedModel(
                    f"{type(module).__name__} attends in both directions", field="model"
                )
            attention = PagedAttention(batch, int(module.layer_idx))
            module.loramux_attention = attention
            attentions.append(attention)
    if not attentions:
        raise UnsupportedModel(
            f"{type(model).__name__} has no attention layers that transformers' registry reaches",
            field="model",
        )
    return attentions


def _used(model: PreTrainedModel, attentions: list[PagedAttention]) -> list[PagedAttention]:
    """The attentions that the probe came through: exactly one a layer, or the model is refused."""
    used = [attention for attention in attentions if attention.key_shape is not None]
    layers = int(model.config.get_text_config().num_hidden_layers)
    missing = sorted(set(range(layers)) - {attention.layer for attention in used})
    if missing or len(used) != layers:
        raise UnsupportedModel(
            f"{type(model).__name__} is not served: {len(missing)} of its {layers} layers do not use "
            f"transformers' attention registry (layers {missing[:8]})",
            field="model",
            remedy="models with other kinds of layer state are not served yet",
        )
    if twice := sorted(attention.layer for attention in used if attention.calls > 1):
        raise UnsupportedModel(
            f"{type(model).__name__} is not served: its layers {twice[:8]} attend more than once, and a "
            "layer has one place for keys and values",
            field="model",
        )
    return used


def _split_unshared(attached: Attached) -> None:
    """Undo a merge whose members turned out not to get one and the same input."""
    for merged in {id(m): m for m, _ in attached.names.values()}.values():
        if merged.computations <= 1 or merged.num_slices == 1:
            continue
        members = [(name, i) for name, (m, i) in attached.names.items() if m is merged]
        for name, index in members:
            alone = _linear([merged.plain(index)], [name], attached)
            attached.names[name] = (alone, 0)
            parent = attached.model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], LinearSlice(alone, 0))


def _build_schema(
    attached: Attached,
    lora: LoRAConfig | None,
    found: list[AttachedExperts],
    outside: list[str],
) -> None:
    """Say what an adapter may bind to, and why not to the rest; `outside` is not the language model."""
    model = attached.model
    output = model.get_output_embeddings()
    modules: dict[str, ModuleSpec] = {}
    refused: dict[str, str] = {}
    site_of: dict[int, int] = {}
    for name, module in model.named_modules():
        if name in attached.names:
            merged, index = attached.names[name]
            if module is output:
                attached.head = merged
                refused[name] = "LoRA on this output head is not served"
            elif lora is not None and not _is_target(name, lora.target_modules):
                refused[name] = LEFT_OUT
            else:
                if id(merged) not in site_of:
                    site_of[id(merged)] = len(attached.sites)
                    attached.sites.append(merged)
                whole = merged.whole_features(index)
                modules[name] = ModuleSpec(
                    *(name, *whole, site_of[id(merged)], index),
                    transposed=name in attached.transposed,
                )
        elif isinstance(module, nn.Embedding):
            refused[name] = "LoRA on an embedding other than the model's own is not served"
        elif type(module) is nn.Linear and is_in(name, outside):
            refused[name] = TOWERS_OFF
        elif isinstance(module, nn.Linear):
            refused[name] = f"{type(module).__name__} is no plain linear layer"
        elif is_in(name, outside) and _is_a_matrix(module):
            refused[name] = "LoRA on a parameter that is in no linear layer is not served"
    experts = {}
    for one in found:
        specs = list(module_specs(one, len(attached.sites) + 2 * len(attached.experts)))
        targets = None if lora is None else lora.target_modules
        kept = {spec.name: spec for spec in specs if _is_target(spec.name, targets)}
        left = dict.fromkeys([spec.name for spec in specs if spec.name not in kept], LEFT_OUT)
        refused |= left if kept else {one.name: LEFT_OUT}
        if not kept:
            continue
        modules |= kept
        attached.experts.append(one.experts)
        experts[one.name] = replace(one.spec, aliases=tuple(aliases_of(model, one.name)))
    vocabulary = find_vocabulary(model)
    parts = () if vocabulary is None else vocabulary.modules
    targets = None if lora is None else lora.target_modules
    left_out = {name: LEFT_OUT for name in parts if not _is_target(name, targets)}
    for name in parts:
        refused.pop(name, None)
    _check_targets_exist(lora, [*modules, *parts])
    refused |= lora_refusals(vocabulary, lora, left_out)
    names = [*modules, *refused, *parts]
    if attached.language is None:
        aliases = {a: name for name in (*modules, *parts) for a in aliases_of(model, name)}
    else:
        aliases = old_names(model, names)
    attached.schema = ModelSchema(
        *(modules, refused, experts, aliases),
        towers=frozenset(name for name in names if is_in(name, outside)),
        hidden_size=int(model.config.get_text_config().hidden_size),
        labels=labels_of(getattr(model.config, "id2label", None)),
        vocab_size=int(model.config.get_text_config().vocab_size),
        vocabulary=vocabulary,
    )


def _is_a_matrix(module: nn.Module) -> bool:
    """Whether it multiplies by a parameter of its own, as Gemma 3's connector does."""
    own = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 2]
    inside = any(isinstance(child, nn.Linear) for child in module.children())
    return bool(own) and not inside and not isinstance(module, nn.Embedding)


def _is_target(name: str, targets: list[str] | None) -> bool:
    return targets is None or any(name == t or name.endswith(f".{t}") for t in targets)


def _check_targets_exist(lora: LoRAConfig | None, modules: Collection[str]) -> None:
    """A target that matches nothing would silently do nothing: refuse it."""
    if lora is None or lora.target_modules is None:
        return
    idle = [t for t in lora.target_modules if not any(_is_target(m, [t]) for m in modules)]
    if idle:
        known = sorted({name.rpartition(".")[2] for name in modules})
        raise UnsupportedModel(
            f"target_modules {idle} match no linear module of this model",
            field="target_modules",
            remedy=f"it has {', '.join(known)}" if known else None,
        )
