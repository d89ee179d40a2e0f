"""The facts of a wrapped model: how large its parts are, and what a step of it takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch

from loramux.config import EngineConfig, ModelFacts
from loramux.config.facts import EncoderFacts, Widths
from loramux.config.graphs import GPU_STEP
from loramux.config.memory import captured_sizes
from loramux.kernels.flashinfer_sizes import Shape, workspace_bytes
from loramux.layers.linear import MergedLinear
from loramux.layers.tower import TowerLinear
from loramux.models.attach import Attached
from loramux.models.device_memory import DeviceMemory

NUM_PROCESSORS = 132  # of an H100 or H200, where the GPU is not there to be asked


def measure(
    attached: Attached,
    config: EngineConfig,
    device: str,
    memory: DeviceMemory,
    limit: tuple[int, str],
) -> ModelFacts:
    """The facts of `attached`, whose weights may be on the meta device.

    `memory` is what `device` has beside the weights, `limit` the longest context and why."""
    return ModelFacts(
        dtype=str(attached.model.dtype).removeprefix("torch."),
        device=device,
        max_positions=limit[0],
        kv_bytes_per_token=_kv_bytes(attached),
        free_bytes=memory.free,
        adapter_elements_per_row=_elements_per_row(attached),
        adapter_outputs=sum(merged.out_features for merged in attached.sites),
        length_limit_reason=limit[1],
        total_bytes=memory.total,
        weight_bytes=weight_bytes(attached),
        attention_bytes=_attention_bytes(attached, config) if device.startswith("cuda") else 0,
        widths=_widths(attached),
        encoder=_encoder(attached),
        row_granule=config.row_granule,
    )


def _elements_per_row(attached: Attached) -> int:
    """What one rank row costs on this rank: A and B of each module, as far as they are here."""
    cuts = attached.shards.cuts
    if not cuts:
        return attached.schema.elements_per_row
    total = 0
    for name, spec in attached.schema.modules.items():
        cut = cuts.get(name)
        if cut is None:  # a router, which every rank has whole
            total += spec.in_features + spec.out_features
            continue
        out = cut.b_output.size * (2 if name.endswith(".gate_up_proj") and spec.experts else 1)
        total += (-(-cut.input.size // cut.deal) + out) * max(1, spec.experts)
    return total


def weight_bytes(attached: Attached) -> int:
    """Bytes of weights and of the fused decoder's tables, each counted once."""
    tensors = chain(_weights(attached), _tables(attached))
    storages = {tensor.untyped_storage()._cdata: tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def _weights(attached: Attached) -> Iterator[torch.Tensor]:
    yield from attached.model.parameters()
    yield from attached.model.buffers()
    for merged, _ in attached.names.values():
        yield from (tensor for tensor in (merged.weight, merged.bias) if tensor is not None)


def _tables(attached: Attached) -> Iterator[torch.Tensor]:
    if attached.decoder is not None:
        yield from attached.decoder.tables.values()


def _encoder(attached: Attached) -> EncoderFacts | None:
    if (towers := attached.towers) is None:
        return None
    return EncoderFacts(towers.vector_bytes, towers.work_bytes, towers.sees_whole)


def _kv_bytes(attached: Attached) -> int:
    """Bytes of K and V of one token over all layers."""
    total = 0
    for attention in attached.attentions:
        assert attention.key_shape is not None and attention.value_shape is not None
        total += attention.key_shape[0] * attention.key_shape[1]
        total += attention.value_shape[0] * attention.value_shape[1]
    return total * attached.model.dtype.itemsize


def _widths(attached: Attached) -> Widths:
    text = attached.model.config.get_text_config()
    linears = {id(merged): merged for merged, _ in attached.names.values()}
    # What encoders take is no part of a step.
    layers: list[MergedLinear] = [
        m for m in linears.values() if m is not attached.head and not isinstance(m, TowerLinear)
    ]
    # On the meta device nothing is fused, for nothing can be compared: the usual case is planned.
    planned = attached.model.device.type == "meta"
    return Widths(
        **_routed(attached),
        hidden=int(text.hidden_size),
        product=max((merged.outer_features[1] for merged in layers), default=0),
        inner=max((merged.outer_features[0] for merged in layers), default=0),
        vocab=int(text.vocab_size),
        itemsize=attached.model.dtype.itemsize,
        fused=planned or attached.decoder is not None,
    )


def _routed(attached: Attached) -> dict[str, int]:
    """What a token takes in a layer of experts."""
    layers = [m.loramux_experts for m in attached.model.modules() if hasattr(m, "loramux_experts")]
    if not layers:
        return {}
    # In and out of every pair; gate and up, and what goes down.
    size = max(2 * experts.hidden + 3 * experts.inner for experts in layers)
    return {"pairs": max(experts.most_pairs for experts in layers), "routed": size}


def _attention_bytes(attached: Attached, config: EngineConfig) -> int:
    """FlashInfer's workspaces; where Triton attends, what it needs is less."""
    if any(attention.sinks is not None for attention in attached.attentions):
        return 0  # FlashInfer is not used
    first = attached.attentions[0]
    assert first.key_shape is not None
    shape = Shape(
        *(first.num_heads, *first.key_shape),
        max_batch=config.max_num_seqs,
        max_rows=max(captured_sizes(config)),
        num_sms=_num_processors(attached.device),
    )
    kinds = len({attention.kind for attention in attached.attentions})
    tokens = max(config.max_num_batched_tokens or GPU_STEP, config.max_num_seqs)
    lists = shape.prefill_bytes(config.max_num_seqs, tokens)
    return workspace_bytes(shape, kinds) + kinds * (1 << (lists - 1).bit_length())


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return NUM_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
