"""Classification heads in adapters: what is read of them, and what is refused by name."""

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

from loramux.adapters.heads import Head, head_of, labels_of
from loramux.adapters.peft import read_adapter
from loramux.adapters.store import AdapterStore
from loramux.config import EngineConfig, LoRAConfig
from loramux.errors import AdapterRejected
from loramux.models.loader import load_schema
from loramux.schema import ModelSchema
from parity.heads import save_classifier
from tiny import save_model

CONFIG = LoRAConfig(max_lora_rank=8)
WEIGHT = "base_model.model.score.weight"
BIAS = "base_model.model.score.bias"
LABELS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("heads") / "model")


@pytest.fixture(scope="module")
def schema(model: Path) -> ModelSchema:
    return load_schema(EngineConfig(model=str(model), lora=CONFIG)).schema


@pytest.fixture(scope="module")
def original(model: Path) -> Path:
    return save_classifier(model, model.parent / "adapter", LABELS, seed=5)


@pytest.fixture
def adapter(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "adapter"))


def _read(folder: Path, schema: ModelSchema, config: LoRAConfig = CONFIG) -> Any:
    return read_adapter("a", folder, schema, config, torch.float32)


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def _rename(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key] = tensors.pop(WEIGHT)


def test_the_head_is_read_with_its_labels(adapter: Path, schema: ModelSchema) -> None:
    weights, report = _read(adapter, schema)
    stored = load_file(adapter / "adapter_model.safetensors")[WEIGHT]
    head = head_of(weights, torch.float32)
    assert head is not None and torch.equal(head.weight, stored) and head.bias is None
    assert weights.ref.labels == head.labels == report.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert report.num_modules == 21 and "a classification head of 3: LABEL_0" in report.format()


@pytest.mark.parametrize("name", ["score", "classifier"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_bias_counts(adapter: Path, schema: ModelSchema, name: str, dtype: torch.dtype) -> None:
    """And the model's type rounds the head and what comes out of it, as it does for PEFT."""
    bias = torch.randn(LABELS)
    stem = f"base_model.model.{name}"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{stem}.weight"] = tensors.pop(WEIGHT)
        tensors[f"{stem}.bias"] = bias

    _edit_weights(adapter, edit)
    weights, _ = _read(adapter, schema)
    head = head_of(weights, dtype)
    assert head is not None
    weight = load_file(adapter / "adapter_model.safetensors")[f"{stem}.weight"].to(dtype)
    hidden = torch.randn(64, dtype=dtype)
    wanted = torch.nn.functional.linear(hidden.double(), weight.double(), bias.to(dtype).double())
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(
        head.logits(hidden.float()).double(), wanted, rtol=tolerance, atol=tolerance
    )


def test_own_labels_come_from_a_configuration_beside_it(adapter: Path, schema: ModelSchema) -> None:
    before = _read(adapter, schema)[0].ref
    names = {str(i): f"label {random.random()}" for i in range(LABELS)}
    (adapter / "config.json").write_text(json.dumps({"id2label": names}))
    named = _read(adapter, schema)[0].ref
    assert named.labels == tuple(names.values()) and named.digest != before.digest
    for content in ('{"id2label": {"0": "a"}}', "no json", "[3]", '{"id2label": [1, 2, 3]}'):
        (adapter / "config.json").write_text(content)
        assert _read(adapter, schema)[0].ref == before


def test_labels_are_in_the_order_of_their_numbers() -> None:
    assert labels_of({"1": "b", "0": "a", 2: "c"}) == ("a", "b", "c")
    for odd in (None, [], {"0": "a", "2": "c"}, {"0": 3}, {"0": ""}, {"0": "x" * 300}):
        assert labels_of(odd) == ()


def test_the_digest_is_of_the_head_too(adapter: Path, schema: ModelSchema) -> None:
    first = _read(adapter, schema)[0].ref.digest
    _edit_weights(adapter, lambda t: t.__setitem__(WEIGHT, t[WEIGHT] + 1e-6))
    assert _read(adapter, schema)[0].ref.digest != first


CONFIG_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"modules_to_save": ["score", "embed_tokens"]}, "modules_to_save has model.embed_tokens, but"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save has lm_head, but"),
    ({"modules_to_save": ["score", "q_proj"]}, "modules_to_save='q_proj'"),
    ({"modules_to_save": "score"}, "modules_to_save='score'"),
    ({"modules_to_save": [["score"]]}, "modules_to_save=[['score']]"),
    ({"task_type": "CAUSAL_LM"}, "modules_to_save"),
    ({"task_type": None}, "modules_to_save"),
    ({"modules_to_save": None}, f"{WEIGHT} is in the file, but the configuration does not save"),
    ({"modules_to_save": ["classifier"]}, "modules_to_save with 'score'"),
]


@pytest.mark.parametrize(("changes", "word"), CONFIG_REFUSALS, ids=str)
def test_config_refusals(
    adapter: Path, schema: ModelSchema, changes: dict[str, Any], word: str
) -> None:
    _edit_config(adapter, **changes)
    with pytest.raises(AdapterRejected) as caught:
        _read(adapter, schema)
    assert any(word in reason for reason in caught.value.reasons), caught.value.reasons


WEIGHT_REFUSALS: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = [
    ("gone", lambda t: t.pop(WEIGHT), "the file has no classifier.weight or score.weight"),
    ("narrow", lambda t: t.update({WEIGHT: torch.ones(3, 63)}), "expected [labels, 64]"),
    ("flat", lambda t: t.update({WEIGHT: torch.ones(64)}), "expected [labels, 64]"),
    ("empty", lambda t: t.update({WEIGHT: torch.ones(0, 64)}), "expected [labels, 64]"),
    ("whole", lambda t: t.update({WEIGHT: torch.ones(3, 64).int()}), "dtype I32"),
    ("nan", lambda t: t[WEIGHT].view(-1)[70].fill_(torch.nan), f"{WEIGHT} holds NaN"),
    ("bias", lambda t: t.update({BIAS: torch.ones(2)}), "expected [3]"),
    ("two", lambda t: t.update({"base_model.model.classifier.weight": t[WEIGHT] + 1}), "has one"),
    ("bias alone", lambda t: t.update({BIAS: t.pop(WEIGHT)[:, 0] + 0}), "with a weight"),
    (
        "as in memory",
        lambda t: _rename(t, "base_model.model.score.modules_to_save.default.weight"),
        "a name that PEFT does not load",
    ),
    ("lora", lambda t: _rename(t, "base_model.model.score.lora_A.weight"), "binds to nothing"),
    ("head alone", lambda t: [t.pop(k) for k in list(t) if k != WEIGHT], "holds no tensor of LoRA"),
]


@pytest.mark.parametrize(
    ("edit", "word"), [c[1:] for c in WEIGHT_REFUSALS], ids=[c[0] for c in WEIGHT_REFUSALS]
)
def test_weight_refusals(
    adapter: Path, schema: ModelSchema, edit: Callable[[Any], Any], word: str
) -> None:
    _edit_weights(adapter, edit)
    with pytest.raises(AdapterRejected) as caught:
        _read(adapter, schema)
    assert any(word in reason for reason in caught.value.reasons), caught.value.reasons


def test_more_labels_than_allowed(adapter: Path, schema: ModelSchema) -> None:
    assert _read(adapter, schema, LoRAConfig(max_lora_cls_labels=LABELS))
    with pytest.raises(AdapterRejected, match="start with --max-lora-cls-labels 3"):
        _read(adapter, schema, LoRAConfig(max_lora_cls_labels=LABELS - 1))


def test_the_store_keeps_the_heads_of_what_is_served(
    adapter: Path, schema: ModelSchema, original: Path
) -> None:
    def gone(digest: str) -> None:
        dropped.append(digest)

    dropped: list[str] = []
    store = AdapterStore(
        *(schema, CONFIG, torch.float32),
        reserved_names=[],
        on_gone=gone,
        head_dtype=torch.float16,
    )
    first = store.add("a", str(original))
    head = store.head(first.digest)
    assert head is not None and torch.equal(head.weight, head.weight.half().float())
    store.add("b", str(original))
    store.remove("a")
    assert store.head(first.digest) is not None  # equal bytes under another name
    store.remove("b")
    assert store.head(first.digest) is None and dropped == [first.digest]
    _edit_weights(adapter, lambda t: t[WEIGHT].view(-1)[3].fill_(1e6))
    with pytest.raises(AdapterRejected, match="overflows in the model's"):
        store.add("c", str(adapter))
    store.close()


def test_one_label_is_a_yes_or_no() -> None:
    weight = torch.randn(1, 8)
    head = Head.of(weight, None, torch.float32, ("spam",))
    logits = head.logits(torch.randn(8))
    assert torch.equal(head.probabilities(logits), logits.sigmoid())
    multi = Head.of(torch.randn(2, 8), None, torch.float32, ("a", "b"), "sigmoid")
    logits = multi.logits(torch.randn(8))
    assert torch.equal(multi.probabilities(logits), logits.sigmoid())
    none = Head.of(weight, None, torch.float32, ("score",), "none")
    assert torch.equal(none.probabilities(logits), logits)
