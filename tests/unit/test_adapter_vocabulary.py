"""Parts of a vocabulary in an adapter's files: what is kept of them, and every reason against them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux.adapters.peft import read_adapter
from loramux.adapters.pool import AdapterPool
from loramux.adapters.vocabulary_rows import rows_of
from loramux.adapters.weights import AdapterWeights
from loramux.config import EngineConfig, LoRAConfig
from loramux.engine.places import Places
from loramux.errors import AdapterRejected
from loramux.models.loader import load_schema
from loramux.models.vocabulary import CheckpointVocabulary
from loramux.types import AdapterRef
from parity.vocabularies import save_vocabulary
from tiny import VOCAB, save_model

LORA = LoRAConfig(enable_vocabulary_lora=True, max_lora_vocabulary_rows=20)
E, H = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
TARGETS = ["q_proj", "embed_tokens", "lm_head"]
Edit = Callable[[dict[str, torch.Tensor]], Any]


class Reader:
    """Reads adapters for one tiny model."""

    def __init__(self, model: Path, lora: LoRAConfig = LORA):
        self.model = model
        config = EngineConfig(model=str(model), lora=lora)
        self.schema = load_schema(config).schema
        self.base = CheckpointVocabulary(config, self.schema, torch.float32)

    def read(self, folder: Path, lora: LoRAConfig = LORA, **more: Any) -> AdapterWeights:
        more = {"base": self.base} | more
        return read_adapter("x", folder, self.schema, lora, torch.float32, **more)[0]

    def reasons(self, folder: Path, lora: LoRAConfig = LORA, **more: Any) -> list[str]:
        with pytest.raises(AdapterRejected) as caught:
            self.read(folder, lora, **more)
        return list(caught.value.reasons)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(save_model(tmp_path_factory.mktemp(request.param) / "model", request.param))


@pytest.fixture(scope="module")
def made(reader: Reader, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By what they have; not to be changed."""
    root = tmp_path_factory.mktemp("made")
    features: dict[str, dict[str, Any]] = {
        "lora": {"target_modules": TARGETS},
        "copies": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "tokens": {"trainable_token_indices": [7, 300, 5]},
        "added": {"resize": VOCAB + 2},
    }
    return {
        name: save_vocabulary(reader.model, root / name, random.randrange(1 << 30), **settings)
        for name, settings in features.items()
    }


def _changed(source: Path, target: Path, edit: Edit = lambda t: None, **config: Any) -> Path:
    shutil.copytree(source, target)
    weights = load_file(source / "adapter_model.safetensors")
    edit(weights)
    weights = {key: tensor.contiguous().clone() for key, tensor in weights.items()}
    save_file(weights, target / "adapter_model.safetensors")
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def test_only_rows_that_differ_are_kept(reader: Reader, made: dict[str, Path]) -> None:
    weights = reader.read(made["copies"])
    stored, base = weights.layout.vocabulary, load_file(reader.model / "model.safetensors")
    assert stored is not None and stored.size == VOCAB
    file = load_file(made["copies"] / "adapter_model.safetensors")
    table = base["model.embed_tokens.weight"]
    for parts, key, own in (
        (stored.embedding, f"{E}.weight", table),
        (stored.head, f"{H}.weight", base.get("lm_head.weight", table)),
    ):
        ids, rows = rows_of(parts, weights.buffer, torch.float32)
        assert ids.tolist() == (file[key] != own).any(1).nonzero().squeeze(1).tolist()
        assert len(ids) == 7 and torch.equal(rows, file[key][ids])
    linear = sum(t.numel() * 4 for k, t in file.items() if "lora" in k)
    assert weights.buffer.numel() == linear + 2 * 7 * 64 * 4
    assert weights.layout.layer_bytes == linear
    assert weights.ref.vocabulary_rows == 7
    again = weights.source.read(memory=_memory())
    assert torch.equal(again, weights.buffer)


def _memory() -> Any:
    from loramux.adapters.host_cache import HostMemory

    return HostMemory()


def test_a_copy_that_trained_nothing_changes_no_vocabulary(
    reader: Reader, made: dict[str, Path], tmp_path: Path
) -> None:
    base = load_file(reader.model / "model.safetensors")["model.embed_tokens.weight"]
    same = _changed(made["tokens"], tmp_path / "same", lambda t: t.update({f"{E}.weight": base}))
    stored = reader.read(same).layout.vocabulary
    assert stored is not None and [len(part.ids) for part in stored.embedding] == [3]

    def only_copy(tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()
        tensors[f"{E}.weight"] = base

    idle = _changed(
        *(made["copies"], tmp_path / "idle", only_copy),
        modules_to_save=["embed_tokens"],
        target_modules=["nothing"],
    )
    assert any("would do nothing" in reason for reason in reader.reasons(idle))


def test_of_a_token_that_is_there_twice_the_trained_row_counts(
    reader: Reader, made: dict[str, Path], tmp_path: Path
) -> None:
    base = load_file(reader.model / "model.safetensors")["model.embed_tokens.weight"].clone()
    base[[5, 9]] += 1
    both = _changed(
        made["tokens"], tmp_path / "both", lambda t: t.update({f"{E}.base_layer.weight": base})
    )
    weights = reader.read(both)
    assert weights.layout.vocabulary is not None
    ids, rows = rows_of(weights.layout.vocabulary.embedding, weights.buffer, torch.float32)
    delta = load_file(both / "adapter_model.safetensors")[
        f"{E}.token_adapter.trainable_tokens_delta"
    ]
    found = dict(zip(ids.tolist(), rows, strict=True))
    assert sorted(found) == [5, 7, 9, 300] and weights.ref.vocabulary_rows == 4
    assert torch.equal(found[9], base[9]) and torch.equal(found[5], delta[2])


def test_the_digest_is_of_everything(reader: Reader, made: dict[str, Path], tmp_path: Path) -> None:
    """Of rows that are not kept as well, and of which tokens are trained."""
    seen = {reader.read(folder).ref.digest for folder in made.values()}
    edits: list[tuple[str, Edit, dict[str, Any]]] = [
        ("lora", lambda t: t[f"{E}.lora_embedding_A"].add_(1e-3), {}),
        ("lora", lambda t: t[f"{H}.lora_B.weight"].add_(1e-3), {}),
        ("tokens", lambda t: None, {"trainable_token_indices": [7, 301, 5]}),
        ("tokens", lambda t: t[f"{E}.token_adapter.trainable_tokens_delta"][1].add_(1e-3), {}),
        ("copies", lambda t: t[f"{E}.weight"][3].add_(1e-3), {}),
        ("copies", lambda t: t[f"{H}.weight"][3].add_(1e-3), {}),
    ]
    for number, (name, edit, config) in enumerate(edits):
        folder = _changed(made[name], tmp_path / str(number), edit, **config)
        seen.add(reader.read(folder).ref.digest)
    assert len(seen) == len(made) + len(edits)


NAN = torch.full((3, 64), torch.nan)
DELTA = f"{E}.token_adapter.trainable_tokens_delta"
REFUSALS: list[tuple[str, Edit, dict[str, Any], str]] = [
    ("lora", lambda t: t.pop(f"{E}.lora_embedding_B"), {}, "not its other half"),
    (
        "lora",
        lambda t: t.update({f"{E}.lora_embedding_A": torch.ones(2, VOCAB)}),
        {},
        "expected [3",
    ),
    ("lora", lambda t: t.update({f"{E}.lora_embedding_B": torch.ones(64, 4)}), {}, "expected [64"),
    ("lora", lambda t: t.update({f"{H}.lora_B.weight": torch.ones(VOCAB - 1, 3)}), {}, "sizes"),
    ("lora", lambda t: t.update({f"{H}.lora_A.weight": torch.ones(3)}), {}, "shape [3]"),
    ("lora", lambda t: t.update({f"{H}.lora_A.weight": torch.ones(3, 64).long()}), {}, "dtype I64"),
    ("lora", lambda t: t[f"{E}.lora_embedding_A"].fill_(torch.inf), {}, "NaN or infinity"),
    ("lora", lambda t: None, {"target_modules": ["q_proj"]}, "does not target"),
    ("lora", lambda t: None, {"modules_to_save": ["lm_head"]}, "has no lm_head.weight"),
    ("lora", lambda t: t.update({f"{E}.lora_A.weight": torch.ones(3, 64)}), {}, "embed_tokens"),
    ("tokens", lambda t: t.pop(DELTA), {}, "file has no rows of them"),
    ("tokens", lambda t: None, {"trainable_token_indices": [7, 5]}, "expected [2, 64]"),
    (
        "tokens",
        lambda t: None,
        {"trainable_token_indices": [7, 5, VOCAB]},
        "outside the vocabulary",
    ),
    ("tokens", lambda t: None, {"trainable_token_indices": [7, 5, -1]}, "a list of token ids"),
    ("tokens", lambda t: None, {"trainable_token_indices": [7, 5, 7]}, "names a token twice"),
    ("tokens", lambda t: None, {"trainable_token_indices": {"q_proj": [1, 2, 3]}}, "'q_proj'"),
    ("tokens", lambda t: t.update({DELTA: NAN}), {}, "NaN or infinity"),
    ("tokens", lambda t: None, {"target_modules": ["q_proj", "embed_tokens"]}, "no tensors for it"),
    ("copies", lambda t: t.pop(f"{H}.weight"), {}, "modules_to_save has lm_head"),
    ("copies", lambda t: t[f"{E}.weight"][2].fill_(torch.nan), {}, "NaN or infinity"),
    ("copies", lambda t: t.update({f"{E}.weight": torch.ones(VOCAB, 63)}), {}, "['any', 64]"),
    ("copies", lambda t: t.update({f"{E}.weight": torch.ones(VOCAB, 64)}), {}, "rows of the voc"),
    ("copies", lambda t: t.update({f"{E}.weight": torch.ones(VOCAB + 1, 64)}), {}, "sizes"),
    (
        "copies",
        lambda t: t.update({f"{E}.bias": torch.ones(VOCAB)}),
        {},
        "binds to no linear layer",
    ),
    ("copies", lambda t: None, {"modules_to_save": ["embed_tokens", "norm"]}, "'norm'"),
    ("copies", lambda t: None, {"ensure_weight_tying": "yes"}, "must be true or false"),
]


def _case_name(value: object) -> str | None:
    """Of a function pytest's own, which is the same in every run."""
    return None if callable(value) else str(value)[:40]


@pytest.mark.parametrize(("name", "edit", "config", "word"), REFUSALS, ids=_case_name)
def test_refusals(
    reader: Reader,
    made: dict[str, Path],
    tmp_path: Path,
    name: str,
    edit: Edit,
    config: dict[str, Any],
    word: str,
) -> None:
    reasons = reader.reasons(_changed(made[name], tmp_path / "x", edit, **config))
    assert any(word in reason for reason in reasons), reasons


def test_added_tokens_need_the_rows_of_both(
    reader: Reader, made: dict[str, Path], tmp_path: Path
) -> None:
    alone = _changed(made["added"], tmp_path / "alone", lambda t: t.pop(f"{H}.weight"))
    assert reader.schema.vocabulary is not None
    if reader.schema.vocabulary.tied:  # one weight
        assert reader.read(alone).ref.vocabulary_rows == 2
        differ = _changed(
            made["added"], tmp_path / "differ", lambda t: t[f"{H}.weight"][0].add_(1.0)
        )
        assert any("one tied weight, and differ" in r for r in reader.reasons(differ))
    else:
        assert any("lacks the rows of lm_head" in r for r in reader.reasons(alone))


def test_tied_lora_is_one(reader: Reader, tmp_path: Path) -> None:
    """PEFT writes it twice, and reads the second over the first."""
    source = tmp_path / "tied"
    targets = ["q_proj", "embed_tokens"]
    save_vocabulary(reader.model, source, 5, target_modules=targets, ensure_weight_tying=True)
    tied = reader.schema.vocabulary is not None and reader.schema.vocabulary.tied
    stored = reader.read(source).layout.vocabulary
    assert (
        stored is not None and list(stored.loras) == ["model.embed_tokens", "lm_head"][: 1 + tied]
    )
    if tied:
        other = _changed(source, tmp_path / "x", lambda t: t[f"{H}.lora_A.weight"][0].add_(1e-3))
        assert any("lm_head has other LoRA" in reason for reason in reader.reasons(other))


def test_settings_that_would_serve_it_are_named(reader: Reader, made: dict[str, Path]) -> None:
    off = LoRAConfig()
    closed = Reader(reader.model, off)
    assert any("--enable-vocabulary-lora" in r for r in closed.reasons(made["lora"], off))
    for name, rows in (("tokens", 3), ("copies", 7), ("added", 2)):
        reasons = reader.reasons(made[name], off)
        assert any(f"start with --max-lora-vocabulary-rows {rows}" in r for r in reasons)
        reader.read(made[name], LoRAConfig(max_lora_vocabulary_rows=rows))
    left_out = LoRAConfig(enable_vocabulary_lora=True, target_modules=["q_proj", "lm_head"])
    config = EngineConfig(model=str(reader.model), lora=left_out)
    refused = load_schema(config).schema.refused
    assert "target_modules leave it out" in refused["model.embed_tokens"]
    assert "lm_head" not in refused


def test_copies_need_the_base_models_rows(reader: Reader, made: dict[str, Path]) -> None:
    assert any("rows are not here" in r for r in reader.reasons(made["copies"], base=None))
    config = EngineConfig(model=str(reader.model), lora=LORA, load_format="dummy")
    dummy = CheckpointVocabulary(config, reader.schema, torch.float32)
    assert any("random" in r for r in reader.reasons(made["copies"], base=dummy))
    reader.read(made["tokens"], base=None)


def test_an_adapter_with_a_vocabulary_takes_a_place_alone() -> None:
    pool = AdapterPool(max_loras=2, max_lora_rank=16)
    places = Places(pool)
    small = AdapterRef("a", "a", "", max_r=4, num_bytes=1)
    own = AdapterRef("b", "b", "", max_r=4, num_bytes=1, vocabulary_size=320)
    places.set_pins({"b": own})
    places.place_pins()
    assert [load.first_row for load in places.take_loads()] == [0]
    assert pool.hold(small.digest, places._rows(small)) == 16
    assert pool.rows_taken == 16 + 4
