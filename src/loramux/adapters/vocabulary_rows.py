"""Full copies of an embedding or an output head, held against the base model: what differs is kept.

    file    | row row row row row ... |      read once, in pieces; its SHA-256 goes into the digest
    kept          row     row row            those that the base model has otherwise, or not at all

A copy that trained three tokens costs three rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from loramux.adapters.files import FileChanged, read_into
from loramux.adapters.header import FLOATS, FileTensor
from loramux.adapters.vocabulary import VocabularyBinding
from loramux.adapters.weights import FileIdentity, Stored, StoredPair, StoredRows, StoredVocabulary
from loramux.config import LoRAConfig
from loramux.schema import VocabularySpec

PIECE_BYTES = 8 << 20  # read and compared at a time


class BaseVocabulary(Protocol):
    """The base model's own rows."""

    @property
    def dtype(self) -> torch.dtype: ...

    def rows(self, module: str, start: int, stop: int) -> torch.Tensor:
        """Rows [stop - start, D] of the embedding or the head in `dtype`, on the CPU. Raises ValueError,
        saying why, where they cannot be had."""
        ...


@dataclass(frozen=True, slots=True)
class Copies:
    """By the tensor's key: the rows that are kept, int64, ascending; and the SHA-256 of the whole."""

    ids: dict[str, np.ndarray] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.ids.values()))


def kept_copies(
    path: Path,
    identity: FileIdentity,
    binding: VocabularyBinding,
    spec: VocabularySpec | None,
    config: LoRAConfig,
    base: BaseVocabulary | None,
) -> tuple[Copies, list[str]]:
    """What is kept of the copies in the file at `path`, or every reason against it."""
    assert spec is not None, "a part of a vocabulary that is not there. This is a bug."
    try:
        copies, reasons = compare_copies(path, identity, binding, spec, base)
    except OSError as error:
        return Copies(), [f"{path.name} is damaged or truncated: {error}"]
    return copies, reasons or too_many_rows(binding, copies, config)


def compare_copies(
    path: Path,
    identity: FileIdentity,
    binding: VocabularyBinding,
    spec: VocabularySpec,
    base: BaseVocabulary | None,
) -> tuple[Copies, list[str]]:
    """Read every copy of the file at `path` once, and find the rows in which it differs from `base`.

    Raises FileChanged, or another OSError."""
    copies, reasons = Copies(), []
    if not binding.compared:
        return copies, []
    if base is None:
        return copies, ["the base model's rows are not here: its full copies cannot be compared"]
    module_of = {tensor.key: module for module, tensor in binding.copies.items()}
    with open(path, "rb", buffering=0) as file:
        _check(file.fileno(), identity)
        for tensor in binding.compared:
            module = module_of.get(tensor.key)
            try:
                kept = _read(
                    file.fileno(), tensor, None if module is None else (module, spec, base)
                )
            except ValueError as error:
                return copies, [f"{tensor.key} cannot be compared with the base model: {error}"]
            copies.digests[tensor.key], copies.ids[tensor.key] = kept
        _check(file.fileno(), identity)
    reasons = [
        f"{one.key} and {other.key} are copies of one tied weight, and differ"
        for one, other in binding.equal
        if copies.digests[one.key] != copies.digests[other.key]
    ]
    return copies, reasons


def _check(file: int, identity: FileIdentity) -> None:
    if FileIdentity.of(os.fstat(file)) != identity:
        raise FileChanged("it was changed while it was read")


def _read(
    file: int, tensor: FileTensor, against: tuple[str, VocabularySpec, BaseVocabulary] | None
) -> tuple[str, np.ndarray]:
    """(SHA-256, rows that differ) of one copy; without `against` none are looked for."""
    rows, width = tensor.shape
    dtype = FLOATS[tensor.dtype]
    step = max(1, PIECE_BYTES // (width * dtype.itemsize))
    digest = hashlib.sha256()
    found: list[np.ndarray] = []
    buffer = bytearray(min(step, rows) * width * dtype.itemsize)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        view = memoryview(buffer)[: (stop - start) * width * dtype.itemsize]
        read_into(file, tensor.start + start * width * dtype.itemsize, view)
        digest.update(view)
        if against is not None:
            piece = torch.frombuffer(view, dtype=dtype).view(-1, width)  # [n, D]
            found.append(start + _differing(piece, start, *against))
    return digest.hexdigest(), np.concatenate(found) if found else np.empty(0, np.int64)


def _differing(
    piece: torch.Tensor, start: int, module: str, spec: VocabularySpec, base: BaseVocabulary
) -> np.ndarray:
    """Which rows of `piece` [n, D], from row `start` of the copy on, are not the base model's."""
    known = max(0, min(len(piece), spec.size - start))
    differ = np.ones(len(piece), dtype=bool)  # [n]: those beyond the base model are new
    if known:
        own = base.rows(module, start, start + known)  # [known, D]
        differ[:known] = (piece[:known].to(base.dtype) != own).any(dim=1).numpy()
    return np.flatnonzero(differ)


def pieces_of(tensor: FileTensor, ids: np.ndarray) -> Iterator[tuple[int, int]]:
    """(place in the file, bytes) of the rows `ids` of a copy, neighbours together."""
    size = tensor.num_bytes // tensor.shape[0]
    if not len(ids):
        return
    ends = np.flatnonzero(np.diff(ids) != 1) + 1
    for run in np.split(ids, ends):
        yield tensor.start + int(run[0]) * size, len(run) * size


def stored_vocabulary(
    binding: VocabularyBinding,
    copies: Copies,
    spec: VocabularySpec,
    stored: Mapping[str, Stored],
    start: int,
) -> StoredVocabulary | None:
    """Where all of it stands, by the places of all tensors, from byte `start` of the buffer on; None:
    nothing is changed."""
    parts: dict[str, tuple[StoredRows, ...]] = {}
    for module in spec.modules:
        found = []
        if (copy := binding.copies.get(module)) is not None and copy.key in stored:
            found.append(StoredRows(copies.ids[copy.key], stored[copy.key]))
        if module in binding.tokens:
            ids, tensor = binding.tokens[module]
            found.append(StoredRows(np.array(ids, np.int64), stored[tensor.key]))
        parts[module] = tuple(found)
    pairs = {
        module: StoredPair(stored[lora.a.key], stored[lora.b.key], lora.scale)
        for module, lora in binding.lora.items()
    }
    if binding.size == spec.size and not pairs and not any(parts.values()):
        return None
    return StoredVocabulary(
        *(binding.size, spec.modules, start),
        *(parts[spec.embedding], parts[spec.head]),
        *(pairs.get(spec.embedding), pairs.get(spec.head)),
    )


def too_many_rows(binding: VocabularyBinding, copies: Copies, config: LoRAConfig) -> list[str]:
    """The reason when a module has more rows of its own than a place has room for."""
    counts = {}
    for module in {*binding.copies, *binding.tokens}:
        ids: set[int] = set()
        if (copy := binding.copies.get(module)) is not None:
            ids.update(copies.ids[copy.key].tolist())
        if module in binding.tokens:
            ids.update(binding.tokens[module][0])
        counts[module] = len(ids)
    most, limit = max(counts.values(), default=0), config.max_lora_vocabulary_rows
    if most <= limit:
        return []
    listed = ", ".join(f"{module} {count}" for module, count in sorted(counts.items()))
    return [
        f"it has rows of the vocabulary of its own ({listed}), more than max_lora_vocabulary_rows "
        f"{limit}; start with --max-lora-vocabulary-rows {most}"
    ]


def rows_report(vocabulary: StoredVocabulary) -> tuple[str, ...]:
    """What an adapter has of its own beside LoRA, for people."""
    counts = {
        name: sum(len(part.ids) for part in parts)
        for name, parts in (("embedding", vocabulary.embedding), ("head", vocabulary.head))
    }
    rows = [f"{count} rows of the {name} of its own" for name, count in counts.items() if count]
    return (f"a vocabulary of {vocabulary.size} tokens", *rows)


def untied(
    binding: VocabularyBinding | None, stored: Mapping[str, Stored], buffer: torch.Tensor
) -> list[str]:
    """The reason when LoRA that is tied is not the same on embedding and head."""
    if binding is None or not binding.ties_lora:
        return []
    embedding, head = binding.lora.values()
    pairs = ((embedding.a, head.b), (embedding.b, head.a))
    if all(
        torch.equal(stored[one.key].view(buffer), stored[other.key].view(buffer).t())
        for one, other in pairs
    ):
        return []
    return [f"ensure_weight_tying is set, but {head.module} has other LoRA than {embedding.module}"]


def rows_of(
    parts: tuple[StoredRows, ...], buffer: torch.Tensor, dtype: torch.dtype
) -> tuple[np.ndarray, torch.Tensor]:
    """(tokens [n] int64, their rows [n, D] in `dtype`); of a token that is there twice, the later."""
    kept_ids: list[np.ndarray] = []
    kept_rows: list[torch.Tensor] = []
    later = np.empty(0, np.int64)
    for part in reversed(parts):
        here = np.flatnonzero(~np.isin(part.ids, later))  # [n]
        rows = part.rows.view(buffer)  # [n', D]
        whole = len(here) == len(part.ids)
        kept_ids.append(part.ids[here])
        kept_rows.append((rows if whole else rows[torch.from_numpy(here)]).to(dtype))
        later = np.concatenate((later, part.ids))
    return np.concatenate(kept_ids), torch.cat(kept_rows)
