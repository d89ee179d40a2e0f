"""Where what is kept of a file stands in memory, how much it is, and its digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch

from loramux.adapters.bindings import Bindings
from loramux.adapters.formats import stored_experts
from loramux.adapters.header import (
    FLOATS,
)
from loramux.adapters.vocabulary_rows import (
    pieces_of,
    stored_vocabulary,
)
from loramux.adapters.weights import (
    Layout,
    Stored,
    StoredPair,
    place,
)
from loramux.schema import ModelSchema


def lay_out(bindings: Bindings, schema: ModelSchema) -> tuple[Layout, dict[str, Stored]]:
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
    vectors = {binding.module: binding.stored(stored) for binding in bindings.vectors}
    own = None
    if vocabulary is not None and schema.vocabulary is not None:
        ends = [
            at + size for (late, _, size, _), at in zip(pieces, offsets, strict=True) if not late
        ]
        spec, start = schema.vocabulary, max(ends, default=0)
        own = stored_vocabulary(vocabulary, bindings.copies, spec, stored, start)
    return Layout(pairs, tuple(runs), experts, head, vectors, own), stored


def num_elements(layout: Layout) -> int:
    """Of all factors, gains and shifts, and of rows of the vocabulary, as the pool holds them."""
    pairs = list(layout.pairs.values())
    stored = []
    if (vocabulary := layout.vocabulary) is not None:
        pairs += vocabulary.loras.values()
        stored = [part.rows for part in (*vocabulary.embedding, *vocabulary.head)]
    stored += [factor for pair in pairs for factor in (pair.a, pair.b)]
    affine = sum(2 * vectors.columns for vectors in layout.vectors.values())
    return (
        affine
        + sum(one.rows * one.columns for one in stored)
        + sum(experts.num_elements for experts in layout.experts.values())
    )


def digest_of(
    canonical: bytes,
    buffer: torch.Tensor,
    bindings: Bindings,
    stored: Mapping[str, Stored],
    tokenizer: str = "",
) -> str:
    """SHA-256 over the configuration, the names, types, shapes and stored bytes of the tensors, and the
    content of a `tokenizer` of its own."""
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
    if tokenizer:
        digest.update(f"tokenizer|{tokenizer}".encode())
    return digest.hexdigest()
