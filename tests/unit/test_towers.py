"""The parts of a multimodal model outside its language model: adapters on them, names, and weights."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from loramux.adapters.peft import read_adapter
from loramux.bench.geometry import geometry, write_model
from loramux.config import EngineConfig, LoRAConfig
from loramux.errors import AdapterRejected, EngineError
from loramux.kernels import Expand, LoRASite
from loramux.layers.batch import LoRAStep, UniformLoRA
from loramux.layers.tower import TowerLinear, TowerSlice, TowerStep, lora_step, pieces
from loramux.models.attach import Attached
from loramux.models.device_memory import DeviceMemory
from loramux.models.loader import facts_before_loading, load_model, load_schema
from loramux.schema import ModelSchema
from parity.multimodal import FAMILIES, save_adapter, save_model
from tiny import TinyWorld

SERVED = [name for name in FAMILIES if name != "paligemma"]
MEMBERS = UniformLoRA(((16, 0.5), (0, -1.5)), (5, 3))
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"

# (family, how checkpoints called a part before, how they do now)
OLD_NAMES = [
    ("llava", "language_model.model.layers", "model.language_model.layers"),
    ("llava", "vision_tower.vision_model", "model.vision_tower"),
    ("llava-next", "multi_modal_projector", "model.multi_modal_projector"),
    ("pixtral", "vision_tower", "model.vision_tower"),
    ("internvl", "language_model.model.layers", "model.language_model.layers"),
    ("gemma3", "vision_tower.vision_model", "model.vision_tower"),
    ("qwen2-vl", "model.layers", "model.language_model.layers"),
    ("qwen2.5-vl", "visual", "model.visual"),
    ("qwen2.5-vl", "model.layers", "model.language_model.layers"),
    ("qwen2-audio", "language_model.model.layers", "model.language_model.layers"),
    ("qwen2-audio", "audio_tower", "model.audio_tower"),
    ("granite-speech", "projector", "model.projector"),
    ("qwen2.5-omni", "thinker.model.layers", "model.layers"),
    ("qwen2.5-omni", "thinker.audio_tower", "audio_tower"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(root / name, name) for name in SERVED}


def structure(folder: Path, **lora: bool) -> Attached:
    return load_schema(EngineConfig(model=str(folder), lora=LoRAConfig(**lora)))


def renamed(folder: Path, copy: Path, new: str, old: str) -> Path:
    """The adapter of `folder` under the names that a part had before."""
    tensors = load_file(folder / WEIGHTS)
    changed = {key.replace(PREFIX + new, PREFIX + old, 1): value for key, value in tensors.items()}
    assert changed.keys() != tensors.keys()
    copy.mkdir()
    save_file(changed, copy / WEIGHTS)
    config = json.loads((folder / "adapter_config.json").read_text())
    modules = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in changed}
    config["target_modules"] = "|".join(sorted(map(re.escape, modules)))
    (copy / "adapter_config.json").write_text(json.dumps(config))
    return copy


# --- one layer -------------------------------------------------------------------------------------


def make_layer(step: TowerStep, *, bias: bool) -> tuple[TowerLinear, torch.Tensor]:
    """A layer with two adapters in its pool, and its weight with MEMBERS in it [N, K] float64."""
    linear = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    layer = TowerLinear(linear, step)
    layer.attach_site(32, torch.float32, under_weight=True)
    assert not layer.extends_product and layer.site is not None
    site: LoRASite = layer.site
    dense = linear.weight.double()  # [N, K]
    for (first, scale), r, own in zip(MEMBERS.members, MEMBERS.ranks, (2.0, 0.25), strict=True):
        site.a[0, first : first + r].normal_()
        site.b[first : first + r].normal_()
        site.row_r[0, first], site.row_scale[0, first] = r, own
        a, b = site.a[0, first : first + r].double(), site.b[first : first + r].double()
        dense = dense + scale * own * (b.t() @ a)  # [N, K]
    return layer, dense


@pytest.mark.parametrize("bias", [True, False])
def test_every_row_takes_the_composition_whatever_the_layout(bias: bool) -> None:
    step = TowerStep()
    layer, dense = make_layer(step, bias=bias)
    module = TowerSlice(layer, 0)
    assert (module.bias is not None) == bias
    offset = 0.0 if layer.bias is None else layer.bias.double()
    for shape in ((3, 7, 24), (130, 24), (2, 5, 1, 24), (3, 7, 24)):
        x = torch.randn(shape)
        assert layer.weight is not None
        base = x @ layer.weight.t() + (0.0 if layer.bias is None else layer.bias)
        with step.of([(MEMBERS, 1)], torch.device("cpu")):
            torch.testing.assert_close(
                module(x).double(), x.double() @ dense.t() + offset, atol=1e-4, rtol=1e-4
            )
        torch.testing.assert_close(module(x), base, atol=1e-5, rtol=1e-5)
        with step.of([(UniformLoRA((), ()), 1)], torch.device("cpu")):
            torch.testing.assert_close(module(x), base, atol=1e-5, rtol=1e-5)


SHARES = [(MEMBERS, 3), (None, 2), (UniformLoRA(((0, 2.0),), (3,)), 1), (None, 1), (MEMBERS, 1)]


def by_share(layer: TowerLinear, dense: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x [8 n, K] through the layer, item by item of SHARES: [8 n, N] float64."""
    assert layer.weight is not None and layer.site is not None
    a, b = layer.site.a[0, :3].double(), layer.site.b[:3].double()
    single = layer.weight.double() + 2.0 * 0.25 * (b.t() @ a)  # [N, K]
    weights = (dense, layer.weight.double(), single, layer.weight.double(), dense)
    parts = x.double().split([size * len(x) // 8 for _, size in SHARES])
    return torch.cat([part @ weight.t() for part, weight in zip(parts, weights, strict=True)])


@pytest.mark.parametrize("rows", [8, 24, 640])
def test_items_with_different_adapters_share_a_call(rows: int) -> None:
    step = TowerStep()
    layer, dense = make_layer(step, bias=False)
    x = torch.randn(rows, 24)
    with step.of(SHARES, torch.device("cpu")):
        got = TowerSlice(layer, 0)(x.view(8, -1, 24)).view(rows, -1)
    torch.testing.assert_close(got.double(), by_share(layer, dense, x), atol=1e-4, rtol=1e-4)


def test_rows_that_do_not_come_out_even_are_refused() -> None:
    step = TowerStep()
    layer, _ = make_layer(step, bias=False)
    with step.of(SHARES, torch.device("cpu")), pytest.raises(EngineError, match="12 rows"):
        TowerSlice(layer, 0)(torch.randn(12, 24))


@pytest.mark.parametrize("rows", [1, 64, 65, 150])
def test_a_gpu_gets_the_same_as_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path of a GPU, by the twins of its kernels."""
    step = TowerStep()
    layer, dense = make_layer(step, bias=False)
    made: list[LoRAStep] = []

    def take(self: TowerStep, count: int) -> None:
        made.append(lora_step([(MEMBERS, 0, count)], torch.device("cpu")))
        self.batch.lora = made[-1]

    monkeypatch.setattr(TowerStep, "take", take)
    x = torch.randn(rows, 24)
    got = TowerSlice(layer, 0)(x)
    torch.testing.assert_close(got.double(), x.double() @ dense.t(), atol=1e-4, rtol=1e-4)
    assert made[0].work.max_chunks == len(made[0].work.chunks) == -(-rows // 64)


@pytest.mark.parametrize("rows", [3, 97])
def test_triton_takes_these_chunks(rows: int) -> None:
    triton_lora = pytest.importorskip("loramux.kernels.triton_lora")
    triton_shrink = pytest.importorskip("loramux.kernels.triton_shrink")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer, dense = make_layer(TowerStep(), bias=False)
    assert layer.weight is not None and layer.site is not None
    x = torch.randn(rows, 24)
    made = lora_step([(MEMBERS, 0, rows)], torch.device(device))
    fields = {n: getattr(layer.site, n).to(device) for n in ("a", "b", "row_r", "row_scale")}
    site = LoRASite(**fields, slice_starts=layer.site.slice_starts)
    h = torch.full((1, rows, made.columns), float("nan"), device=device)
    y = (x @ layer.weight.t()).to(device)
    triton_shrink.lora_shrink(x.to(device), site, made.work, h)
    triton_lora.lora_expand(y, Expand(site, h, made.work))
    torch.testing.assert_close(y.cpu().double(), x.double() @ dense.t(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rows", [8, 328])
def test_triton_takes_the_chunks_of_several_items(rows: int) -> None:
    triton_lora = pytest.importorskip("loramux.kernels.triton_lora")
    triton_shrink = pytest.importorskip("loramux.kernels.triton_shrink")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer, dense = make_layer(TowerStep(), bias=False)
    assert layer.weight is not None and layer.site is not None
    x = torch.randn(rows, 24)
    made = lora_step(pieces(SHARES, rows), torch.device(device))
    fields = {n: getattr(layer.site, n).to(device) for n in ("a", "b", "row_r", "row_scale")}
    site = LoRASite(**fields, slice_starts=layer.site.slice_starts)
    h = torch.full((1, rows, made.columns), float("nan"), device=device)
    y = (x @ layer.weight.t()).to(device)
    triton_shrink.lora_shrink(x.to(device), site, made.work, h)
    triton_lora.lora_expand(y, Expand(site, h, made.work))
    wanted = by_share(layer, dense, x)
    torch.testing.assert_close(y.cpu().double(), wanted, atol=1e-3, rtol=1e-3)


# --- what adapters bind to -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVED)
def test_adapters_on_every_part_bind_where_that_is_served(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    served, plain = (
        structure(folders[name], enable_tower_connector_lora=on) for on in (True, False)
    )
    linears = {n for n, m in plain.model.named_modules() if type(m) is nn.Linear}
    assert served.schema.modules.keys() - plain.schema.modules.keys() == linears
    assert linears <= plain.schema.towers == served.schema.towers
    assert not any(".layers." in n and "language" in n for n in plain.schema.towers)
    for part, target in FAMILIES[name].parts.items():
        folder = save_adapter(folders[name], tmp_path / part, part)
        if not isinstance(target, str):
            with pytest.raises(AdapterRejected, match="in no linear layer"):
                read(folder, served.schema)
            continue
        _, report = read(folder, served.schema)
        assert all(
            (row.module in served.schema.towers) == (part != "language") for row in report.rows
        )
        if part == "language":
            assert read(folder, plain.schema)[0].ref.digest == report.digest
        else:
            with pytest.raises(AdapterRejected, match="--enable-tower-connector-lora"):
                read(folder, plain.schema)


def read(folder: Path, schema: ModelSchema, **lora: bool):  # type: ignore[no-untyped-def]
    return read_adapter("it", folder, schema, LoRAConfig(**lora), torch.float32)


def test_what_is_not_served_may_be_left_out(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folders["llava"]
    both = r".*(language_model\.layers\.\d+\.self_attn\.q_proj|vision_tower.*fc1)"
    mixed = save_adapter(folder, tmp_path / "mixed", "language", target_modules=both)
    schema = structure(folder).schema
    with pytest.raises(AdapterRejected, match="--enable-tower-connector-lora"):
        read(mixed, schema)
    with caplog.at_level(logging.WARNING, "loramux"):
        _, report = read(mixed, schema, allow_partial_adapters=True)
    assert report.num_modules == 3 and not schema.towers & {row.module for row in report.rows}
    (line,) = [record.getMessage() for record in caplog.records]
    assert "vision_tower.encoder.layers.0.mlp.fc1" in line and "'it'" in line
    tower = save_adapter(folder, tmp_path / "tower", "tower")
    with pytest.raises(AdapterRejected, match="nothing would be left"):
        read(tower, schema, allow_partial_adapters=True)
    # What is no part of the model at all is refused as ever.
    odd = renamed(mixed, tmp_path / "odd", "model.vision_tower", "model.vision_trower")
    with pytest.raises(AdapterRejected, match="vision_trower"):
        read(odd, schema, allow_partial_adapters=True)
    # So is half of an adapter on the language model.
    tensors = load_file(mixed / WEIGHTS)
    del tensors[next(key for key in tensors if "q_proj.lora_B" in key)]
    save_file(tensors, mixed / WEIGHTS)
    with pytest.raises(AdapterRejected, match="q_proj"):
        read(mixed, schema, allow_partial_adapters=True)


@pytest.mark.parametrize(("name", "old", "new"), OLD_NAMES)
def test_adapters_bind_by_the_names_of_older_checkpoints(
    name: str, old: str, new: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    schema = structure(folders[name], enable_tower_connector_lora=True).schema
    for part in FAMILIES[name].parts:
        folder = save_adapter(folders[name], tmp_path / part, part)
        if any(key.startswith(f"{PREFIX}{new}.") for key in load_file(folder / WEIGHTS)):
            break
    _, report = read(folder, schema)
    _, older = read(renamed(folder, tmp_path / "old", new, old), schema)
    assert {row.module for row in older.rows} == {row.module for row in report.rows}
    assert not schema.aliases.keys() & schema.modules.keys()


def test_a_text_model_says_that_the_setting_means_nothing(
    tiny_world: TinyWorld, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "loramux"):
        attached = structure(tiny_world.model, enable_tower_connector_lora=True)
    assert attached.towers is None and not attached.schema.towers
    assert "has no towers" in caplog.text


# --- loading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVED)
def test_made_up_weights_leave_constants_as_they_are(name: str, folders: dict[str, Path]) -> None:
    config = EngineConfig(
        model=str(folders[name]), device="cpu", dtype="float32", lora=LoRAConfig()
    )
    real = load_model(config)
    made = load_model(config.model_copy(update={"load_format": "dummy"}))
    buffers = dict(real.attached.model.named_buffers())
    for key, value in made.attached.model.named_buffers():
        assert torch.equal(value, buffers[key]), key
    assert all(p.isfinite().all() for p in made.attached.model.parameters())
    before = facts_before_loading(config, DeviceMemory(1 << 34, 1 << 34), "cpu")
    for facts in (before, made.facts):
        assert facts.kv_bytes_per_token == real.facts.kv_bytes_per_token == 3 * 2 * 2 * 16 * 4
        assert facts.widths == real.facts.widths
    assert made.facts.weight_bytes == real.facts.weight_bytes == before.weight_bytes
    towers = load_model(
        config.model_copy(update={"lora": LoRAConfig(enable_tower_connector_lora=True)})
    )
    assert towers.facts.weight_bytes == real.facts.weight_bytes
    assert towers.facts.widths == real.facts.widths
    assert towers.facts.adapter_elements_per_row > real.facts.adapter_elements_per_row
    assert real.vocab_size == real.attached.model.get_output_embeddings().out_features
    assert real.eos_token_ids == {2}


def test_of_qwen_omni_the_thinker_is_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    thinker = json.loads((folders["qwen2.5-omni"] / "config.json").read_text())
    whole = {"model_type": "qwen2_5_omni", "thinker_config": thinker, "enable_audio_output": False}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    tensors = load_file(folders["qwen2.5-omni"] / "model.safetensors")
    named = {f"thinker.{key}": tensor for key, tensor in tensors.items()}
    save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = {"device": "cpu", "dtype": "float32"}
    ours = load_model(EngineConfig(model=str(tmp_path), **settings))
    alone = load_model(EngineConfig(model=str(folders["qwen2.5-omni"]), **settings))
    for key, parameter in alone.attached.model.named_parameters():
        assert torch.equal(parameter, ours.attached.model.get_parameter(key)), key


def test_an_adapter_beside_the_weights_is_not_put_on(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """As in Granite-Speech's folders."""
    folder = save_model(tmp_path / "model", "granite-speech")
    save_adapter(folder, tmp_path / "adapter", "language")
    for file in ("adapter_config.json", WEIGHTS):
        (folder / file).write_bytes((tmp_path / "adapter" / file).read_bytes())
    settings = {"device": "cpu", "dtype": "float32"}
    ours = load_model(EngineConfig(model=str(folder), **settings)).attached
    alone = load_model(EngineConfig(model=str(folders["granite-speech"]), **settings)).attached
    assert ours.schema.modules.keys() == alone.schema.modules.keys()
    assert not any("lora" in name for name, _ in ours.model.named_modules())
    ids, places = torch.arange(5), torch.arange(5)
    assert torch.equal(ours.own_forward(ids, places), alone.own_forward(ids, places))
    weights, _ = read(folder, ours.schema)
    assert weights.ref.max_r == 4


def test_the_geometry_of_qwen2_5_vl(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "large", geometry("qwen2.5-vl-7b"))
    config = AutoConfig.from_pretrained(folder)
    assert config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
    assert config.vision_config.fullatt_block_indexes == [7, 15, 23, 31]
    attached = structure(folder, enable_tower_connector_lora=True)
    merged = {id(m): m for m, _ in attached.names.values()}.values()
    sizes = [p.numel() for p in attached.model.parameters()]
    sizes += [t.numel() for m in merged for t in (m.weight, m.bias) if t is not None]
    assert sum(sizes) == 8_292_166_656  # as that model's card has it
    tiny = write_model(tmp_path / "tiny", geometry("tiny-vl"))
    settings = {"device": "cpu", "dtype": "float32", "load_format": "dummy"}
    loaded = load_model(EngineConfig(model=str(tiny), **settings))
    assert loaded.attached.decoder is not None and loaded.attached.towers is not None
