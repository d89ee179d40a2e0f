"""Recognising the standard pre-norm decoder in a transformers model, and proving the fused one equal.

Nothing is believed of a model's name: its layers are taken apart by their attributes, and what was
put together has to give what the model's own forward gives, layer by layer, on random tokens. Where
it does not, the model keeps its own forward, and one line in the log says why.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from loramux.kernels import Activation, rms_norm
from loramux.layers.linear import LinearSlice, MergedLinear
from loramux.models.attach import Attached
from loramux.models.choices import Choices
from loramux.models.layers import FusedDecoder, FusedLayer, GatedMLP, Norm
from loramux.models.mrope import MRope, has_sections
from loramux.models.norms import FusedRMSNorm
from loramux.models.proof import small_cache, small_step

logger = logging.getLogger(__name__)

CHECKED_TOKENS = 9
ROUTED_LOGITS = (
    75  # layers agree with each other's input, but a token that went elsewhere stays away
)
# Of the branch's own size, and of the sum it is rounded into.
TOLERANCE = {torch.bfloat16: (3e-2, 4e-3), torch.float16: (5e-3, 1e-3), torch.float32: (1e-4, 1e-5)}
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
SANDWICH_NORMS = (*PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


class NotStandardError(Exception):
    """Why a model keeps its own forward."""


def fuse(attached: Attached, num_positions: int, extra_rows: int = 0) -> FusedDecoder | None:
    """The fused decoder of `attached` for contexts of `num_positions`, or None with a line in the
    log. Call before the KV cache is allocated and the weights are packed.

    `extra_rows`: so many tokens of a step may have three positions each, where the model knows them."""
    name = type(attached.model).__name__
    try:
        decoder = _take_apart(attached, num_positions, extra_rows)
        _compare(attached, decoder)
    except NotStandardError as reason:
        logger.info("%s keeps its own forward: %s", name, reason)
        return None
    logger.info("%s runs fused: %d layers", name, len(decoder.layers))
    return decoder


def _take_apart(attached: Attached, num_positions: int, extra_rows: int) -> FusedDecoder:
    body = _body(attached)
    layers = _get(body, "layers")
    text = attached.model.config.get_text_config()
    names = [getattr(text, name, None) for name in ("hidden_act", "hidden_activation")]
    activation = next((ACTIVATIONS[name] for name in names if name in ACTIVATIONS), None)
    fused = [_layer(module, attached, activation, text, i) for i, module in enumerate(layers)]
    rotary, dtype, device = _get(body, "rotary_emb"), attached.model.dtype, attached.device
    assert fused[0].attention.key_shape is not None
    size = fused[0].attention.key_shape[1]
    tables = {
        rope: _table(rotary, rope, num_positions, dtype, device, size)
        for rope in {layer.rope for layer in fused}
    }
    mrope = _mrope(rotary, device)
    extra_rows = 0 if mrope is None else max(extra_rows, CHECKED_TOKENS)
    if extra_rows:
        tables = {rope: F.pad(table, (0, 0, 0, extra_rows)) for rope, table in tables.items()}
    return FusedDecoder(
        embedding=attached.model.get_input_embeddings(),
        layers=fused,
        final=_norm(body, "norm"),
        head=attached.model.get_output_embeddings(),
        tables=tables,
        batch=attached.batch,
        # In a multimodal model the head stands outside, and nothing is done to what it gives.
        softcap=0.0
        if attached.language
        else float(getattr(text, "final_logit_softcapping", None) or 0.0),
        mrope=mrope,
        num_positions=num_positions,
        extra_rows=extra_rows,
    )


def _body(attached: Attached) -> Any:
    """What holds the layers."""
    return attached.language.decoder if attached.language else _get(attached.model, "model")


def _layer(
    module: nn.Module, attached: Attached, activation: Activation | None, text: Any, index: int
) -> FusedLayer:
    attention, mlp = _get(module, "self_attn"), _get(module, "mlp")
    norms = [name for name, child in module.named_children() if isinstance(child, FusedRMSNorm)]
    others = {name for name, _ in module.named_children()} - {"self_attn", "mlp", *norms}
    others = {name for name in others if not isinstance(getattr(module, name), nn.Dropout)}
    if others or tuple(sorted(norms)) not in (
        tuple(sorted(PRE_NORMS)),
        tuple(sorted(SANDWICH_NORMS)),
    ):
        raise NotStandardError(f"its layers have other parts: {sorted(others) or norms}")
    sandwich = len(norms) == len(SANDWICH_NORMS)
    paged = attention.loramux_attention
    head_norms = _head_norms(attention)
    kinds = getattr(text, "layer_types", None)
    layer = FusedLayer(
        qkv=_merged(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
        o=_merged(attention, ("o_proj",), "o_proj"),
        mlp=_mlp(mlp, activation),
        attention=paged,
        before_attention=_norm(module, "input_layernorm"),
        before_mlp=_norm(module, SANDWICH_NORMS[2] if sandwich else PRE_NORMS[1]),
        rope=str(kinds[index]) if kinds else "",
        head_norms=head_norms,
        after_attention=_norm(module, PRE_NORMS[1]) if sandwich else None,
        after_mlp=_norm(module, SANDWICH_NORMS[3]) if sandwich else None,
    )
    _check_shapes(layer)
    return layer


def _mlp(mlp: nn.Module, activation: Activation | None) -> GatedMLP | nn.Module:
    """Its three products, or, where experts are in it, the module itself."""
    if any(hasattr(module, "loramux_experts") for module in mlp.modules()):
        return mlp
    if activation is None:
        raise NotStandardError("its activation is neither SiLU nor tanh GELU")
    gate_up = _merged(mlp, ("gate_proj", "up_proj"), "gate_up_proj")
    return GatedMLP(gate_up, _merged(mlp, ("down_proj",), "down_proj"), activation)


def _check_shapes(layer: FusedLayer) -> None:
    """The merged products have to be what the fused ops cut apart."""
    attention = layer.attention
    assert attention.key_shape is not None and attention.value_shape is not None
    kv_heads, size = attention.key_shape
    if attention.value_shape != (kv_heads, size):
        raise NotStandardError("its values have other heads than its keys")
    if layer.qkv.outer_features[1] != (attention.num_heads + 2 * kv_heads) * size:
        raise NotStandardError("its q, k and v are not side by side")
    if layer.o.outer_features[0] != attention.num_heads * size:
        raise NotStandardError("its output projection takes something else than the heads")
    mlp = layer.mlp
    if isinstance(mlp, GatedMLP) and (
        mlp.gate_up.outer_features[1] != 2 * mlp.down.outer_features[0]
    ):
        raise NotStandardError("its MLP is not gated")
    norms = (layer.before_attention, layer.before_mlp, layer.after_attention, layer.after_mlp)
    if len({norm.mode for norm in norms if norm}) > 1 or len({n.eps for n in norms if n}) > 1:
        raise NotStandardError("its norms differ in kind")


def _head_norms(attention: nn.Module) -> tuple[Norm, Norm] | None:
    found = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if all(norm is None for norm in found):
        return None
    size = attention.loramux_attention.key_shape[1]  # type: ignore[union-attr, index]
    for norm in found:
        if not isinstance(norm, FusedRMSNorm) or norm.weight.shape != (size,):
            raise NotStandardError("its q and k norms are not RMS norms of single heads")
    return _norm(attention, "q_norm"), _norm(attention, "k_norm")


def _get(module: nn.Module, name: str) -> Any:
    child = getattr(module, name, None)
    if child is None:
        raise NotStandardError(f"{type(module).__name__} has no {name}")
    return child


def _norm(module: nn.Module, name: str) -> Norm:
    child = getattr(module, name, None)
    if not isinstance(child, FusedRMSNorm):
        raise NotStandardError(f"{name} is no RMS norm that we know")
    return Norm.of(child)


def _merged(module: nn.Module, names: tuple[str, ...], whole: str) -> MergedLinear:
    """The product of all `names`, or of the one layer `whole` that some models have instead."""
    for group in (names, (whole,)):
        found = [getattr(module, name, None) for name in group]
        merged = {id(c.merged): c.merged for c in found if isinstance(c, LinearSlice)}
        if len(merged) == 1 and None not in found:
            (only,) = merged.values()
            if only.num_slices == len(group):
                return only
    raise NotStandardError(f"{type(module).__name__} has no {', '.join(names)} with one input")


def _table(
    rotary: nn.Module,
    rope: str,
    num_positions: int,
    dtype: torch.dtype,
    device: torch.device,
    size: int,
) -> torch.Tensor:
    """cos, then sin, of every position [P, rot], as the model's own rotary embedding gives them for
    heads of `size` features."""
    like = torch.zeros(1, 1, dtype=dtype, device=device)
    positions = torch.arange(num_positions, device=device).unsqueeze(0)  # [1, P]
    if has_sections(rotary):
        positions = positions.expand(3, 1, -1)  # [3, 1, P]
    arguments = inspect.signature(rotary.forward).parameters
    with torch.inference_mode(False), torch.no_grad():
        if "layer_type" in arguments:
            cos, sin = rotary(like, positions, layer_type=rope)  # [1, P, rot]
        else:
            cos, sin = rotary(like, positions)  # [1, P, rot]
    if 2 * cos.shape[-1] == size:  # GPT-OSS says each angle once
        return torch.cat((cos[0], sin[0]), dim=-1).contiguous()  # [P, rot]
    half = cos.shape[-1] // 2
    if not torch.equal(cos[..., :half], cos[..., half:]):
        raise NotStandardError("its rotary embedding turns other pairs of features")
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1).contiguous()  # [P, rot]


def _mrope(rotary: nn.Module, device: torch.device) -> MRope | None:
    try:
        return MRope.of(rotary, device)
    except ValueError as error:
        raise NotStandardError(str(error)) from error


# --- the proof -------------------------------------------------------------------------------------


@torch.inference_mode()
def _compare(attached: Attached, decoder: FusedDecoder) -> None:
    """Every layer, and the whole, against the model's own forward on random tokens."""
    model = attached.model
    choices = Choices(model)
    generator = torch.Generator().manual_seed(0)
    vocab = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(vocab, (CHECKED_TOKENS,), generator=generator).to(attached.device)  # [T]
    positions = _checked_positions(decoder, generator).to(attached.device)  # [T] or [3, T]
    with small_cache(attached), small_step(attached, 0, CHECKED_TOKENS):
        attached.batch.positions = _place(decoder, positions)  # [T]
        with choices.kept():
            expected, seen = _own_forward(attached, ids, positions)  # [T, V]
        for index, (layer, (x, after)) in enumerate(zip(decoder.layers, seen, strict=True)):
            norm = layer.before_attention
            normed = rms_norm(x, norm.weight, norm.eps, norm.mode)  # [T, D]
            table = decoder.tables[layer.rope]
            with choices.repeated():
                _, got = layer.forward(normed, x, norm, table, attached.batch)  # [T, D]
            _check_layer(got, after, x, index)
        with choices.repeated():
            logits = decoder.forward(ids)  # [T, V]
    error = float((logits.float() - expected.float()).norm() / expected.float().norm())
    if not error <= 20 * TOLERANCE[model.dtype][1]:
        raise NotStandardError(f"its logits differ by {error:.1e}: there is more than its layers")


def _checked_positions(decoder: FusedDecoder, generator: torch.Generator) -> torch.Tensor:
    """The first and the last that there are, for attention may change with them: [T]. With an M-RoPE
    some have three different ones: [3, T]."""
    ramp, last = torch.arange(CHECKED_TOKENS), decoder.num_positions - 1  # [T]
    positions = torch.where(ramp > CHECKED_TOKENS // 2, last - ramp, ramp)  # [T]
    positions = positions.clamp(0, last)  # [T]
    if decoder.mrope is None:
        return positions
    other = torch.randint(last + 1, (3, CHECKED_TOKENS), generator=generator)  # [3, T]
    return torch.where(ramp % 3 == 0, positions, other)  # [3, T]


def _place(decoder: FusedDecoder, positions: torch.Tensor) -> torch.Tensor:
    """Positions [T] or [3, T] as the step has them: [T] int32."""
    if positions.dim() == 1:
        return positions.int()  # [T]
    first, rows = decoder.set_positions(positions), torch.arange(positions.shape[1])  # [T]
    equal = (positions == positions[0]).all(0)  # [T]
    return torch.where(equal, positions[0], first + rows.to(equal.device)).int()  # [T]


def _own_forward(
    attached: Attached, ids: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The model's own logits [T, V] at `positions` [T] or [3, T], and what went in and came out of each
    layer, [T, D] each."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(_: nn.Module, inputs: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        before = inputs[0] if inputs else given["hidden_states"]  # [1, T, D]
        after = output[0] if isinstance(output, tuple) else output  # [1, T, D]
        seen.append((before[0].clone(), after[0].clone()))

    layers: Any = _body(attached).layers
    hooks = [layer.register_forward_hook(see, with_kwargs=True) for layer in layers]
    try:
        logits = attached.own_forward(ids, positions)  # [T, V]
    finally:
        for hook in hooks:
            hook.remove()
    return logits, seen


def _check_layer(
    got: torch.Tensor, expected: torch.Tensor, before: torch.Tensor, index: int
) -> None:
    """All [T, D]. The branch counts by its own size, the sum by what rounding does to it."""
    own, rounding = TOLERANCE[got.dtype]
    error = (got.float() - expected.float()).norm()
    branch = (expected.float() - before.float()).norm()
    if not float(error) <= own * float(branch) + rounding * float(expected.float().norm()):
        raise NotStandardError(
            f"layer {index} differs from its own forward by {float(error / branch):.1e}"
        )
