"""`loramux adapter convert`: what is written equals what PEFT computes, and nothing else is written."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loramux.adapters.convert import convert_adapter
from loramux.adapters.peft import read_adapter
from loramux.cli import main
from loramux.config import EngineConfig, LoRAConfig
from loramux.errors import AdapterExists, AdapterRejected, InvalidField
from loramux.models.loader import load_schema
from loramux.schema import ModelSchema
from tiny import save_adapter, save_model

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LORA = LoRAConfig(max_lora_rank=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("convert") / "model")


@pytest.fixture(scope="module")
def schema(model: Path) -> ModelSchema:
    return load_schema(EngineConfig(model=str(model), lora=LORA)).schema


@pytest.fixture
def old(model: Path, tmp_path: Path) -> Path:
    """An adapter as older PEFT saved it."""
    folder = save_adapter(model, tmp_path / "old", seed=int.from_bytes(os.urandom(3), "big"))
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()
    (folder / "config.json").write_text('{"id2label": {"0": "a"}}')
    return folder


def reasons_of(*arguments: Any, **keywords: Any) -> str:
    with pytest.raises(AdapterRejected) as caught:
        convert_adapter(*arguments, **keywords)
    return "; ".join(caught.value.reasons)


# --- pickles -----------------------------------------------------------------------------------


def test_a_pickle_becomes_the_same_tensors(
    old: Path, tmp_path: Path, schema: ModelSchema, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AdapterRejected, match="loramux adapter convert SRC DST"):
        read_adapter("old", old, schema, LORA, torch.float32)
    assert main(["adapter", "convert", str(old), str(tmp_path / "deep" / "new")]) == 0
    assert "read with weights_only" in capsys.readouterr().out
    new = tmp_path / "deep" / "new"
    assert {p.name for p in new.iterdir()} == {CONFIG, WEIGHTS, "config.json"}
    wanted, found = torch.load(old / PICKLE, weights_only=True), load_file(new / WEIGHTS)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert json.loads((new / CONFIG).read_text()) == json.loads((old / CONFIG).read_text())
    read_adapter("new", new, schema, LORA, torch.float32)


class _Code:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/loramux-pickle-ran",)


def _as_pickle(content: Any) -> Any:
    return lambda path: torch.save(content, path)


def _with_code(path: Path) -> None:
    path.write_bytes(pickle.dumps({"base_model.model.x.lora_A.weight": _Code()}))


def _compressed(path: Path) -> None:
    torch.save({"base_model.model.x.lora_A.weight": torch.zeros(1 << 16)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


KEY = "base_model.model.x.lora_A.weight"
BAD_PICKLES: list[tuple[Any, str]] = [
    (_with_code, "weights_only"),
    (_compressed, "compressed archive"),
    (lambda path: path.write_bytes(b""), "weights_only"),
    (lambda path: path.write_bytes(os.urandom(300)), "weights_only"),
    (_as_pickle([torch.zeros(2)]), "no dictionary"),
    (_as_pickle({3: torch.zeros(2)}), "no dictionary"),
    (_as_pickle({}), "no tensors"),
    (_as_pickle({KEY: 3}), "no ordinary tensor"),
    (_as_pickle({KEY: torch.zeros(2, 2).to_sparse()}), "no ordinary tensor"),
    (_as_pickle({KEY: torch.zeros(2, 2, device="meta")}), "no ordinary tensor"),
    (_as_pickle({KEY: torch.zeros(2, 2, dtype=torch.int8)}), "dtype"),
    (_as_pickle({KEY: torch.zeros(1).expand(1 << 20)}), "describes"),
    (_as_pickle({KEY: torch.tensor([float("nan")])}), "NaN"),
    (_as_pickle({"lora_A.weight": torch.zeros(2)}), "does not start with"),
]


@pytest.mark.parametrize(("write", "message"), BAD_PICKLES)
def test_bad_pickles_are_refused(old: Path, tmp_path: Path, write: Any, message: str) -> None:
    write(old / PICKLE)
    assert message in reasons_of(str(old), str(tmp_path / "new"))
    assert not os.path.exists("/tmp/loramux-pickle-ran")
    assert [path.name for path in tmp_path.iterdir()] == ["old"], "nothing is left behind"


def test_truncated_pickles_are_refused(old: Path, tmp_path: Path) -> None:
    data = (old / PICKLE).read_bytes()
    for _ in range(20):
        cut = int.from_bytes(os.urandom(4), "big") % len(data)
        (old / PICKLE).write_bytes(data[:cut])
        assert PICKLE in reasons_of(str(old), str(tmp_path / "new"))


def test_shared_storage_is_written_apart(old: Path, tmp_path: Path) -> None:
    shared = torch.randn(4, 8)
    torch.save({KEY: shared, "base_model.model.y.lora_A.weight": shared[:2]}, old / PICKLE)
    convert_adapter(str(old), str(tmp_path / "new"))
    assert torch.equal(load_file(tmp_path / "new" / WEIGHTS)[KEY], shared)


def test_what_exists_is_never_written(old: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("there", "link"):
        with pytest.raises(AdapterExists):
            convert_adapter(str(old), str(tmp_path / name))
    assert not list((tmp_path / "there").iterdir())


def test_an_ordinary_adapter_is_not_converted(model: Path, tmp_path: Path) -> None:
    folder = save_adapter(model, tmp_path / "plain")
    assert "nothing to convert" in reasons_of(str(folder), str(tmp_path / "new"))
    assert "--base is for" in reasons_of(str(folder), str(tmp_path / "new"), base=str(model))


def test_a_bad_configuration_is_refused(old: Path, tmp_path: Path) -> None:
    for text in ("", "[]", '{"r": "x"}', "{" * 100_000):
        (old / CONFIG).write_text(text)
        assert reasons_of(str(old), str(tmp_path / "new"))


# --- initialisations that change the base weights ----------------------------------------------


def _train(model: Path, init: str, steps: float = 0.05, **settings: Any) -> tuple[Any, Any]:
    """A PEFT model whose adapter has moved from its start, and a copy of the start."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(
        init_lora_weights=init,  # type: ignore[arg-type]
        target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
        **{"r": 4, "lora_alpha": 6, **settings},
    )
    trained = get_peft_model(base, config)
    start = copy.deepcopy(trained)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter += steps * torch.randn_like(parameter)
    return trained, start


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(tokens).logits
    return logits


def _on_original(model: Path, adapter: Path, tokens: torch.Tensor) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return _logits(PeftModel.from_pretrained(base, adapter), tokens)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_converted_from_the_base_model(
    model: Path, tmp_path: Path, schema: ModelSchema, init: str, rslora: bool
) -> None:
    settings: dict[str, Any] = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    trained, _ = _train(model, init, use_rslora=rslora, **settings)
    trained.save_pretrained(tmp_path / "saved")
    with pytest.raises(AdapterRejected, match=f"init_lora_weights='{init}'.*--base MODEL"):
        read_adapter("a", tmp_path / "saved", schema, LORA, torch.float32)
    new = tmp_path / "new"
    line = ["adapter", "convert", str(tmp_path / "saved"), str(new), "--base", str(model)]
    assert main(line) == 0
    weights, report = read_adapter("a", new, schema, LORA, torch.float32)
    assert report.max_r == 8 and weights.pairs["model.layers.0.self_attn.v_proj"].r == 4
    tokens = torch.randint(0, 300, (2, 12))
    wanted = _logits(trained, tokens)
    torch.testing.assert_close(_on_original(model, new, tokens), wanted, rtol=1e-3, atol=2e-4)
    # What is written is small where training moved little: it survives 16 bits.
    rounded = {k: v.bfloat16() for k, v in load_file(new / WEIGHTS).items()}
    moved, other = _delta(new, load_file(new / WEIGHTS)), _delta(new, rounded)
    assert all(_error(other[m], moved[m]) < 0.02 for m in moved)


def _delta(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = [key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key]
    return {
        n: tensors[f"{n}.lora_B.weight"].double() @ tensors[f"{n}.lora_A.weight"].double()
        for n in names
    }


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_converted_from_the_initial_adapter_equals_peft(
    model: Path, tmp_path: Path, schema: ModelSchema, init: str
) -> None:
    trained, start = _train(model, init)
    # As PEFT's documentation does it: `True` first, so that loading does not start anew.
    start.peft_config["default"].init_lora_weights = True
    start.save_pretrained(tmp_path / "start")
    trained.save_pretrained(tmp_path / "saved")
    if init == "pissa_niter_4":
        with pytest.raises(AdapterRejected, match="--initial FOLDER"):
            read_adapter("a", tmp_path / "saved", schema, LORA, torch.float32)
        assert "--initial" in reasons_of(str(tmp_path / "saved"), str(tmp_path / "n"))
        assert "neither" in reasons_of(
            str(tmp_path / "saved"), str(tmp_path / "n"), base=str(model)
        )
    convert_adapter(str(tmp_path / "saved"), str(tmp_path / "new"), initial=str(tmp_path / "start"))
    trained.save_pretrained(
        tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    ours, theirs = (json.loads((tmp_path / n / CONFIG).read_text()) for n in ("new", "peft"))
    for key in ("r", "lora_alpha", "init_lora_weights"):
        assert ours[key] == theirs[key]
    wanted = _delta(tmp_path, load_file(tmp_path / "peft" / WEIGHTS))
    found = _delta(tmp_path, load_file(tmp_path / "new" / WEIGHTS))
    assert found.keys() == wanted.keys()
    assert all(_error(found[m], wanted[m]) < 1e-4 for m in wanted)
    for name in ("new", "peft"):
        read_adapter(name, tmp_path / name, schema, LORA, torch.float32)


def test_an_adapter_that_says_true_may_be_given_its_start(model: Path, tmp_path: Path) -> None:
    """PEFT's documentation leads there; without the start, nothing in the file tells."""
    trained, start = _train(model, "pissa")
    for one, name in ((trained, "saved"), (start, "start")):
        one.peft_config["default"].init_lora_weights = True
        one.save_pretrained(tmp_path / name)
    convert_adapter(str(tmp_path / "saved"), str(tmp_path / "new"), initial=str(tmp_path / "start"))
    tokens = torch.randint(0, 300, (2, 12))
    found = _on_original(model, tmp_path / "new", tokens)
    torch.testing.assert_close(found, _logits(trained, tokens), rtol=1e-3, atol=2e-4)


def test_starts_that_do_not_fit_are_refused(model: Path, tmp_path: Path) -> None:
    trained, start = _train(model, "pissa")
    trained.save_pretrained(tmp_path / "saved")
    start.save_pretrained(tmp_path / "start")
    saved, target = str(tmp_path / "saved"), str(tmp_path / "new")
    assert "give --base MODEL" in reasons_of(saved, target)
    with pytest.raises(InvalidField):
        convert_adapter(saved, target, base=str(model), initial=str(tmp_path / "start"))
    other = save_model(tmp_path / "other", hidden_size=32, num_attention_heads=2)
    said = reasons_of(saved, target, base=str(other))
    assert "the base model has no model.layers.0" in said and "layers.2" in said
    tensors = load_file(tmp_path / "start" / WEIGHTS)
    dropped = sorted(tensors)[0]
    del tensors[dropped]
    save_file(tensors, tmp_path / "start" / WEIGHTS)
    assert "of these shapes" in reasons_of(saved, target, initial=str(tmp_path / "start"))
    data = json.loads((tmp_path / "start" / CONFIG).read_text())
    (tmp_path / "start" / CONFIG).write_text(json.dumps(data | {"lora_alpha": 99}))
    assert "another r, lora_alpha" in reasons_of(saved, target, initial=str(tmp_path / "start"))
    assert not Path(target).exists()


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("loftq", "cannot be converted"),
        ("corda", "--initial FOLDER"),
        ("lora_ga", "--initial FOLDER"),
        ("OLoRA", "--base MODEL"),
        ("something", "unknown to loramux"),
        ("PiSSA", "unknown to loramux"),
    ],
)
def test_each_initialisation_says_its_remedy(
    model: Path, tmp_path: Path, schema: ModelSchema, init: str, message: str
) -> None:
    folder = save_adapter(model, tmp_path / "a")
    data = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(data | {"init_lora_weights": init}))
    with pytest.raises(AdapterRejected, match=message):
        read_adapter("a", folder, schema, LORA, torch.float32)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica"])
def test_plain_initialisations_leave_the_base_as_it_was(
    model: Path, tmp_path: Path, schema: ModelSchema, init: Any
) -> None:
    trained, _ = _train(model, init, steps=0.0)
    base = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    for name, parameter in trained.base_model.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name.replace(".base_layer", "")]), name
    trained.save_pretrained(tmp_path / "saved")
    read_adapter("a", tmp_path / "saved", schema, LORA, torch.float32)
    shutil.rmtree(tmp_path / "saved")
