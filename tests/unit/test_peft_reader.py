"""PEFT folders: what binds, what is refused, and that every reason is told at once."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file

from loramux.adapters.header import MAX_HEADER_BYTES
from loramux.adapters.peft import read_adapter
from loramux.adapters.peft_config import PeftConfig, read_config
from loramux.config import EngineConfig, LoRAConfig
from loramux.errors import AdapterNotFound, AdapterRejected
from loramux.models.loader import load_schema
from loramux.schema import ModelSchema
from tiny import save_adapter, save_model

CONFIG = LoRAConfig(max_lora_rank=8)


@pytest.fixture(scope="module")
def schema(model: Path) -> ModelSchema:
    return load_schema(EngineConfig(model=str(model), lora=CONFIG)).schema


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("reader") / "model")


@pytest.fixture(scope="module")
def original(model: Path) -> Path:
    return save_adapter(model, model.parent / "adapter", r=4, lora_alpha=6)


@pytest.fixture
def adapter(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "adapter"))


def _read(folder: Path, schema: ModelSchema, config: LoRAConfig = CONFIG) -> Any:
    return read_adapter("a", folder, schema, config, torch.float32)


def _reasons(folder: Path, schema: ModelSchema, config: LoRAConfig = CONFIG) -> list[str]:
    with pytest.raises(AdapterRejected) as caught:
        _read(folder, schema, config)
    return caught.value.reasons


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_report_lists_every_tensor(adapter: Path, schema: ModelSchema) -> None:
    weights, report = _read(adapter, schema)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert {row.tensor for row in report.rows} == set(stored)
    assert report.num_modules == len(schema.modules) == 21
    assert report.max_r == weights.ref.max_r == 4
    assert all(row.scale == 1.5 for row in report.rows)
    name = "model.layers.0.self_attn.q_proj"
    pair = weights.pairs[name]
    assert torch.equal(pair.a, stored[f"base_model.model.{name}.lora_A.weight"])
    assert torch.equal(pair.b, stored[f"base_model.model.{name}.lora_B.weight"].t())
    text = report.format()
    assert name in text and "42 tensors bind to 21 modules" in text


def test_scaling_follows_peft(adapter: Path, schema: ModelSchema) -> None:
    _edit_config(adapter, use_rslora=True, alpha_pattern={"o_proj": 3})
    weights, _ = _read(adapter, schema)
    assert weights.pairs["model.layers.0.self_attn.q_proj"].scale == 6 / math.sqrt(4)
    assert weights.pairs["model.layers.0.self_attn.o_proj"].scale == 3 / math.sqrt(4)


def test_digest_is_of_the_content(adapter: Path, schema: ModelSchema, tmp_path: Path) -> None:
    first = _read(adapter, schema)[0].ref.digest
    copy = Path(shutil.copytree(adapter, tmp_path / "elsewhere"))
    # PEFT looks up in the model how base weights lie, and sets what a file says of it right.
    _edit_config(copy, task_type=None, peft_version="other", lora_dropout=0.5, fan_in_fan_out=True)
    assert _read(copy, schema)[0].ref.digest == first
    _edit_config(copy, lora_alpha=7)
    changed_scale = _read(copy, schema)[0].ref.digest
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    _edit_weights(adapter, lambda t: t.__setitem__(key, t[key] + 1e-6))
    changed_weights = _read(adapter, schema)[0].ref.digest
    assert len({first, changed_scale, changed_weights}) == 3


CONFIG_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora is set, but the file has no lora_magnitude_vector of"),
    ({"lora_bias": True}, "lora_bias is set, but the file has no lora_B.bias of"),
    ({"use_dora": True, "lora_bias": True}, "do not go together"),
    ({"use_dora": "yes"}, "use_dora must be true or false"),
    ({"bias": "some"}, "bias must be one of none, all, lora_only"),
    ({"bias": ["all"]}, "bias must be one of"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "this model has no experts"),
    ({"target_parameters": "q_proj.weight"}, "target_parameters must be a list"),
    ({"target_parameters": [3]}, "target_parameters must be a list"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    (
        {"fan_in_fan_out": True, "target_parameters": ["q_proj.weight"]},
        "no adapter with both fan_in_fan_out and target_parameters",
    ),
    ({"use_qalora": True}, "use_qalora"),
    ({"some_new_switch": True}, "some_new_switch"),
    ({"peft_type": "LOHA"}, "LOHA"),
    ({"init_lora_weights": "pissa_niter_4"}, "convert --initial FOLDER SRC DST"),
    ({"init_lora_weights": "olora"}, "olora"),
    ({"r": 0}, "r must be"),
    ({"r": "4"}, "r must be"),
    ({"r": True}, "r must be"),
    ({"lora_alpha": "x"}, "lora_alpha"),
    ({"target_modules": None}, "target_modules is missing"),
    ({"target_modules": 3}, "target_modules must"),
    ({"target_modules": "("}, "no regular expression"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    ({"alpha_pattern": {"(": 1}}, "no regular expression"),
    ({"layers_to_transform": "one"}, "layers_to_transform"),
    ({"r": 5}, "expected [5, 64]"),
    ({"rank_pattern": {"q_proj": 6}}, "expected [6, 64]"),
    ({"target_modules": ["q_proj"]}, "does not target"),
    ({"exclude_modules": ["o_proj"]}, "does not target"),
    ({"target_modules": "(a+)+$" + "x" * 3000}, "too long"),
    ({"rank_pattern": {f"a{n}+": 1 for n in range(3000)}}, "3000 regular expressions, more than"),
    ({"layers_pattern": 3}, "layers_pattern must be"),
]


@pytest.mark.parametrize(("changes", "word"), CONFIG_REFUSALS, ids=lambda v: str(v)[:40])
def test_config_refusals(
    adapter: Path, schema: ModelSchema, changes: dict[str, Any], word: str
) -> None:
    _edit_config(adapter, **changes)
    assert any(word in reason for reason in _reasons(adapter, schema)), _reasons(adapter, schema)


def _rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if old in k]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return edit


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WEIGHT_REFUSALS: list[tuple[Callable[[dict[str, torch.Tensor]], None], str]] = [
    (lambda t: t.clear(), "no tensor"),
    (_rename("base_model.model.", ""), "does not start with"),
    (_rename("model.layers", "transformer.layers"), "binds to nothing"),
    (_rename("layers.2.", "layers.7."), "binds to nothing"),
    (lambda t: t.__setitem__(Q0, torch.zeros(4, 63)), "expected [4, 64]"),
    (lambda t: t.__setitem__(Q0, torch.full((4, 64), math.nan)), "NaN"),
    (lambda t: t.__setitem__(Q0, torch.full((4, 64), math.inf)), "NaN or infinity"),
    (lambda t: t.__setitem__(Q0, torch.zeros(4, 64, dtype=torch.int8)), "dtype I8"),
    (lambda t: t.__delitem__(Q0), "not its other half"),
    (lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp.up_proj" in k], "no tensors for it"),
    (
        lambda t: t.__setitem__(
            Q0.replace("lora_A.weight", "lora_magnitude_vector"), torch.ones(4)
        ),
        "does not set use_dora",
    ),
    (
        lambda t: t.__setitem__(
            "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias", torch.ones(64)
        ),
        "does not set bias",
    ),
    (
        lambda t: t.__setitem__("base_model.model.model.norm.bias", torch.ones(64)),
        "binds to no linear layer",
    ),
    (
        lambda t: t.__setitem__("base_model.model.lm_head.lora_A.weight", torch.ones(4, 64)),
        "output head",
    ),
    (
        lambda t: t.__setitem__("base_model.model.model.embed_tokens.weight", torch.ones(4)),
        "expected ['any', 64]",
    ),
]


@pytest.mark.parametrize(("edit", "word"), WEIGHT_REFUSALS, ids=[w for _, w in WEIGHT_REFUSALS])
def test_weight_refusals(
    adapter: Path, schema: ModelSchema, edit: Callable[[Any], None], word: str
) -> None:
    _edit_weights(adapter, edit)
    reasons = _reasons(adapter, schema)
    assert any(word in reason for reason in reasons), reasons
    assert len(reasons) <= 30, "reasons of one kind are to be summarised"


def test_all_reasons_come_at_once(adapter: Path, schema: ModelSchema) -> None:
    _edit_config(adapter, use_dora=True, lora_bias=True, use_qalora=True)
    _edit_weights(adapter, _rename("layers.2.", "layers.9."))
    text = "; ".join(_reasons(adapter, schema))
    for word in ("use_dora", "use_qalora", "lora_bias", "layers.9", "and 6 more of the same kind"):
        assert word in text


def test_rank_above_the_limit_says_which_flag(adapter: Path, schema: ModelSchema) -> None:
    reasons = _reasons(adapter, schema, LoRAConfig(max_lora_rank=3))
    assert "--max-lora-rank 4" in reasons[0]


def test_damaged_files(adapter: Path, schema: ModelSchema) -> None:
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    for broken in (whole[:-10], whole[:50], b"", b"\xff" * 64, (1 << 62).to_bytes(8, "little")):
        path.write_bytes(broken)
        assert "damaged or truncated" in _reasons(adapter, schema)[0]
    path.unlink()
    assert "is missing" in _reasons(adapter, schema)[0]
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    assert "pickle" in _reasons(adapter, schema)[0]


@pytest.mark.parametrize("claimed", [0, MAX_HEADER_BYTES + 1])
def test_the_length_of_the_header_is_checked_before_it_is_read(
    adapter: Path, schema: ModelSchema, claimed: int
) -> None:
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    claimed = claimed or len(whole) - 7  # one byte more than there is
    path.write_bytes(claimed.to_bytes(8, "little") + whole[8:])
    if claimed > MAX_HEADER_BYTES:
        os.truncate(path, 8 + claimed)  # a sparse file: long enough, and empty
    assert f"claims {claimed} bytes" in _reasons(adapter, schema)[0]


def test_damaged_config(adapter: Path, schema: ModelSchema) -> None:
    path = adapter / "adapter_config.json"
    for broken in (b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b" " * (9 << 20)):
        path.write_bytes(broken)
        assert "adapter_config.json" in _reasons(adapter, schema)[0]
    path.unlink()
    assert "is missing" in _reasons(adapter, schema)[0]


def test_no_folder(tmp_path: Path, schema: ModelSchema) -> None:
    with pytest.raises(AdapterNotFound, match="nothing"):
        _read(tmp_path / "nothing", schema)


def test_overflow_in_the_serving_dtype_is_refused(adapter: Path, schema: ModelSchema) -> None:
    _edit_weights(adapter, lambda t: t.__setitem__(Q0, torch.full((4, 64), 1e6)))
    with pytest.raises(AdapterRejected, match="overflows"):
        read_adapter("a", adapter, schema, CONFIG, torch.float16)


def test_slow_patterns_are_stopped(adapter: Path, schema: ModelSchema) -> None:
    _edit_config(adapter, target_modules=r"(([a-z._0-9])*)*\1\2\1#")
    text = "; ".join(_reasons(adapter, schema))
    assert "too long to match" in text or "does not target" in text


def test_deployment_target_modules(model: Path, adapter: Path) -> None:
    config = LoRAConfig(max_lora_rank=8, target_modules=["self_attn.o_proj", "v_proj"])
    schema = load_schema(EngineConfig(model=str(model), lora=config)).schema
    assert len(schema.modules) == 6
    assert "leave it out" in _reasons(adapter, schema, config)[0]


NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.11.mlp.down_proj",
    "model.h.2.mlp.down_proj",
    "q_proj",
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    target=st.one_of(
        st.lists(st.sampled_from(["q_proj", "o_proj", "mlp.down_proj", NAMES[0]]), min_size=1),
        st.sampled_from([".*q_proj", r".*\.(q|o)_proj", r"model\.layers\.\d\..*"]),
    ),
    exclude=st.one_of(
        st.none(), st.sampled_from(["q_proj", ".*o_proj"]).map(lambda v: [v]), st.just(".*o_proj")
    ),
    layers=st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 11), max_size=3)),
    pattern=st.one_of(st.none(), st.sampled_from(["layers", "h", ["h", "layers"]])),
)
def test_targets_agree_with_peft(target: Any, exclude: Any, layers: Any, pattern: Any) -> None:
    if isinstance(target, str) and layers is not None:
        return  # PEFT refuses this combination itself
    if pattern is not None and not layers:
        return  # likewise
    data = {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": target,
        "exclude_modules": exclude,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    theirs = LoraConfig(**data)
    ours = _config_of(data)
    for name in NAMES:
        assert ours.targets(name) == bool(check_target_module_exists(theirs, name)), (name, data)


def _config_of(data: dict[str, Any]) -> PeftConfig:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        (Path(folder) / "adapter_config.json").write_text(json.dumps(data))
        config, _, reasons = read_config(Path(folder))
    assert config is not None and not reasons
    return config


HEADER_BYTES = st.binary(max_size=200)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_is_a_typed_refusal_or_accepted(
    original: Path,
    schema: ModelSchema,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    weights = bytearray((original / "adapter_model.safetensors").read_bytes())
    config = (original / "adapter_config.json").read_bytes()
    if data.draw(st.booleans()):
        header_end = 8 + int.from_bytes(weights[:8], "little")
        for _ in range(data.draw(st.integers(1, 4))):
            weights[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    else:
        parsed = json.loads(config)
        key = data.draw(st.sampled_from(sorted(parsed)))
        parsed[key] = data.draw(
            st.recursive(
                st.none() | st.booleans() | st.integers(-5, 999) | st.text(max_size=6),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=3), inner, max_size=3)
                ),
                max_leaves=5,
            )
        )
        config = json.dumps(parsed).encode()
    (folder / "adapter_model.safetensors").write_bytes(bytes(weights))
    (folder / "adapter_config.json").write_bytes(config)
    try:
        _read(folder, schema)
    except AdapterRejected as error:
        assert error.reasons
    finally:
        shutil.rmtree(folder)


REFUSED_WITH_ALORA: list[tuple[dict[str, Any], str]] = [
    ({"alora_invocation_tokens": "go"}, "must be a list of up to 512 token ids"),
    ({"alora_invocation_tokens": 7}, "must be a list"),
    ({"alora_invocation_tokens": [1, -1]}, "must be a list"),
    ({"alora_invocation_tokens": [1, True]}, "must be a list"),
    ({"alora_invocation_tokens": [1, 2.0]}, "must be a list"),
    ({"alora_invocation_tokens": [[1]]}, "must be a list"),
    ({"alora_invocation_tokens": {"1": 1}}, "must be a list"),
    ({"alora_invocation_tokens": [1] * 513}, "must be a list"),
    ({"alora_invocation_tokens": [1 << 40]}, "must be a list"),
    ({"alora_invocation_tokens": [5, 320]}, "token id 320, outside the vocabulary of 320"),
    ({"task_type": None}, "task_type None: PEFT activates LoRA for CAUSAL_LM only"),
    ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS'"),
    ({"task_type": [1]}, "task_type list"),
    ({"use_dora": True}, "alora_invocation_tokens with use_dora"),
    ({"target_parameters": ["x.weight"]}, "alora_invocation_tokens with target_parameters"),
    ({"bias": "all"}, "alora_invocation_tokens with bias"),
    ({"modules_to_save": ["lm_head"]}, "alora_invocation_tokens with modules_to_save"),
    ({"trainable_token_indices": [3]}, "alora_invocation_tokens with trainable_token_indices"),
    ({"init_lora_weights": "mica"}, "PEFT has no activated MiCA"),
]


@pytest.mark.parametrize(("changes", "word"), REFUSED_WITH_ALORA, ids=lambda v: str(v)[:40])
def test_what_does_not_go_with_activated_lora(
    adapter: Path, schema: ModelSchema, changes: dict[str, Any], word: str
) -> None:
    _edit_config(adapter, **{"alora_invocation_tokens": [5, 6], **changes})
    assert any(word in reason for reason in _reasons(adapter, schema)), _reasons(adapter, schema)


def test_the_invocation_is_part_of_the_version(adapter: Path, schema: ModelSchema) -> None:
    plain = _read(adapter, schema)[0].ref
    _edit_config(adapter, alora_invocation_tokens=None)
    assert _read(adapter, schema)[0].ref.digest == plain.digest
    _edit_config(adapter, alora_invocation_tokens=[])  # plain LoRA for PEFT
    assert _read(adapter, schema)[0].ref == plain and plain.invocation == ()
    digests = {plain.digest}
    for tokens in ([5, 6], [6, 5], [5], [0], [319]):
        _edit_config(adapter, alora_invocation_tokens=tokens)
        weights, report = _read(adapter, schema)
        assert weights.ref.invocation == tuple(tokens)
        assert f"these tokens on: {', '.join(map(str, tokens))}" in report.format()
        digests.add(weights.ref.digest)
    assert len(digests) == 6
