"""`loramux bench` on a mixture of experts of which only the geometry is there.

What is measured here means nothing: the cores are shared with other tests.
"""

from __future__ import annotations

import dataclasses
import json
import random
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from loramux.bench import at_once, decode, load, main, profile, sitting
from loramux.bench.case import LINEARS, make_adapter
from loramux.bench.ceilings import Ceilings, StepFloor
from loramux.bench.geometry import geometry, write_model
from loramux.bench.jobs import Job, run
from loramux.bench.linears import OF_MLP, adapter_elements, linears
from loramux.bench.random_adapters import _cut, write_adapters
from loramux.bench.sitting import Sitting, sit
from loramux.bench.system import open_ours
from loramux.bench.throughput import parse as parse_throughput
from loramux.models.fill import fill_random, materialise
from loramux.models.shards import Shards
from loramux.parallel import ALONE

TINY = ["--geometry", "tiny-moe"]
SMALL = [*TINY, "--rank", "4", "--input-len", "8"]
ATTENTION = ["--targets", "q_proj", "o_proj"]
CEILINGS = Ceilings("NVIDIA H200", 4e12, 8e14, 5e10, 1e10)
SLOW = Ceilings("cpu", 1e3, 1e9, 1e3, 1e3)  # a byte takes a millisecond

# One layer whose sizes are easy to multiply: attention has 16 + 8 + 8 + 16 weights, an expert 36.
BY_HAND = {
    **{"model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": 4, "vocab_size": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2},
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 3},
}


def made_sitting(folder: Path, workload: str, options: Any) -> Sitting:
    made = Sitting(workload, options, {}, folder, {"machine": {}}, ceilings=SLOW)
    made.prepare()
    return made


def rows_of(job: Job) -> list[dict[str, Any]]:
    return [{**row, **job.marks, "system": "x"} for row in run(job, open_ours, print, 0.0)]


# --- geometry ------------------------------------------------------------------------------------


def test_the_folder_is_one_that_transformers_reads(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write_model(tmp_path / "model", geometry("qwen3-30b-a3b")))
    assert (config.model_type, config.num_hidden_layers, config.num_experts) == (
        *("qwen3_moe", 48, 128),
    )
    assert (config.num_experts_per_tok, config.norm_topk_prob) == (8, True)
    assert config.rope_parameters["rope_theta"] == 1e6 and config.rms_norm_eps == 1e-6
    assert config.max_position_embeddings == 8192 and not config.tie_word_embeddings
    assert geometry("qwen3-30b-a3b:8").config["num_hidden_layers"] == 8
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == 30_532_122_624


def test_weights_counted_are_those_of_the_model(tmp_path: Path) -> None:
    shape = geometry(random.choice(["qwen3-30b-a3b:3", "tiny-moe", "tiny-moe:5"]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(write_model(tmp_path / "model", shape))
        )
    matrices = {n: w.numel() for n, w in model.named_parameters() if w.ndim > 1}
    head, embedding = matrices["lm_head.weight"], matrices["model.embed_tokens.weight"]
    floor = StepFloor(shape.config, CEILINGS)
    assert floor.head_weights == head
    everything = floor.touched_weights(1_000_000)  # so many tokens leave out no expert
    assert everything == pytest.approx(sum(matrices.values()) - head - embedding, rel=1e-12)
    experts = sum(n for name, n in matrices.items() if ".experts." in name)
    config = shape.config
    idle = experts - experts * config["num_experts_per_tok"] // config["num_experts"]
    assert floor.layer_weights == sum(matrices.values()) - head - embedding - idle


def test_made_up_weights_spread_tokens_over_the_experts(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write_model(tmp_path / "model", geometry("tiny-moe")))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    materialise(model, "cpu")
    fill_random(model, Shards(ALONE), random.randrange(1 << 30), "cpu")
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _module, _x, answer: chosen.append(answer[2]))
    with torch.inference_mode():
        logits = model(torch.randint(3, config.vocab_size, (16, 32))).logits  # [16, 32, V]
    assert bool(logits.isfinite().all()) and float(logits.std()) > 0.01
    assert len(chosen) == 2
    for experts in chosen:  # [512, 2]
        counts = torch.bincount(experts.flatten(), minlength=8)  # [8]
        assert int(counts.min()) > 0 and float(counts.max()) < 3 * 2 * 512 / 8


# --- adapters ------------------------------------------------------------------------------------


class Layers(nn.Module):
    """The linear layers of the tiny mixture, each expert's by themselves, as PEFT wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(self._layer() for _ in range(2))

    def _layer(self) -> nn.Module:
        layer = nn.Module()
        layer.self_attn, layer.mlp = nn.Module(), nn.Module()
        for name, out in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32), ("o_proj", 64)):
            layer.self_attn.add_module(name, nn.Linear(64, out, bias=False))
        layer.mlp.experts = nn.ModuleList(nn.Module() for _ in range(8))
        for expert in layer.mlp.experts:
            expert.gate_proj = nn.Linear(64, 32, bias=False)
            expert.up_proj = nn.Linear(64, 32, bias=False)
            expert.down_proj = nn.Linear(32, 64, bias=False)
        return layer

    def prepare_inputs_for_generation(self) -> None:
        """PEFT asks whether it is there."""


@pytest.mark.parametrize("targets", [LINEARS, ("q_proj", "down_proj"), ("gate_proj",)])
def test_adapters_are_pefts_for_a_model_with_an_expert_a_module(
    tmp_path: Path, targets: tuple[str, ...]
) -> None:
    config = geometry("tiny-moe").config
    paths = write_adapters(tmp_path, config, 3, 4, targets, seed=random.randrange(1 << 30))
    written = [load_file(path / "adapter_model.safetensors") for path in paths]
    loaded = PeftModel.from_pretrained(Layers(), paths[0])
    expected = get_peft_model_state_dict(loaded)
    assert written[0].keys() == expected.keys()
    for name, tensor in written[0].items():
        assert tensor.shape == expected[name].shape
        assert torch.equal(tensor.float(), expected[name].float())
        assert not any(tensor.equal(other[name]) for other in written[1:])
        assert 0.01 < float(tensor.float().std()) < 0.04  # A and B alike
    assert sum(t.numel() for t in written[0].values()) == adapter_elements(config, 4, targets)


def test_experts_of_one_adapter_differ(tmp_path: Path) -> None:
    (path,) = write_adapters(tmp_path, geometry("tiny-moe").config, 1, 4, ("up_proj",))
    tensors = list(load_file(path / "adapter_model.safetensors").values())
    assert len(tensors) == 2 * 8 * 2
    assert len({bytes(t.view(torch.uint8).numpy().tobytes()) for t in tensors}) == len(tensors)


def test_sizes_of_an_adapter_at_full_depth() -> None:
    config = geometry("qwen3-30b-a3b").config
    attention = (2048 + 4096) + 2 * (2048 + 512) + (4096 + 2048)
    expert = 2 * (2048 + 768) + (768 + 2048)
    assert adapter_elements(config, 16) == 48 * 16 * (attention + 128 * expert)
    assert 2 * adapter_elements(config, 16) == 1_687_683_072
    assert 2 * adapter_elements(config, 16, LINEARS[:4]) == 26_738_688
    numbers = torch.empty(adapter_elements(config, 1), device="meta")
    tensors = _cut(numbers, config, 1, LINEARS)
    assert sum(".experts." in name for name in tensors) == 36_864
    last = tensors["base_model.model.model.layers.47.mlp.experts.127.down_proj.lora_B.weight"]
    assert last.shape == (2048, 1)


# --- floors --------------------------------------------------------------------------------------


def test_uniform_routing_touches_as_many_experts_as_expected() -> None:
    dice = random.Random()
    experts, per_token = dice.choice([(8, 2), (128, 8), (16, 1)])
    config = {**BY_HAND, "num_experts": experts, "num_experts_per_tok": per_token}
    linear = linears(config)["down_proj"]
    for tokens in (1, 2, dice.randrange(3, 40)):
        drawn = [
            len({e for _ in range(tokens) for e in dice.sample(range(experts), per_token)})
            for _ in range(3000)
        ]
        assert linear.touched(tokens) == pytest.approx(sum(drawn) / len(drawn), rel=0.03)
    assert linear.touched(0) == 0 and linear.touched(1) == pytest.approx(per_token)


def test_floor_of_a_decode_step_by_hand() -> None:
    floor = StepFloor(BY_HAND, SLOW)
    assert floor.layer_weights == 48 + 4 * 4 + 2 * 36
    assert floor.touched_weights(1) == 48 + 16 + 2 * 36
    assert floor.touched_weights(2) == 48 + 16 + 3 * 36  # 4 (1 - 1/4) experts
    assert floor.kv_bytes_per_token == 2 * 2 * 2
    assert floor.decode_ms(1, 0, 0) == pytest.approx(2 * (136 + 32))
    assert floor.decode_ms(2, 0, 0) == pytest.approx(2 * (172 + 32))
    assert floor.decode_ms(2, 10, 100) == pytest.approx(2 * 204 + 2 * 10 * 8 + 100)
    # With many rows it is the products that take time, and those are of the active experts.
    few_products = StepFloor(BY_HAND, dataclasses.replace(SLOW, gemm_flop_s=1e2))
    assert few_products.decode_ms(64, 0, 0) == pytest.approx(1000 * 2 * 168 * 64 / 1e2)


def test_floor_of_adapters_by_hand() -> None:
    floor = StepFloor(BY_HAND, SLOW)
    attention, expert = 8 + 6 + 6 + 8, 3 * (4 + 3)  # in + out
    assert floor.adapter_bytes(1, LINEARS, 4, 2) == 2 * 2 * (attention + 3 * expert)
    assert floor.adapter_bytes(16, LINEARS, 4, 2) == 16 * floor.adapter_bytes(1, LINEARS, 4, 2)
    # Of two adapters one has two tokens, which touch 3 experts, and one has a single token.
    assert floor.adapter_bytes(1, LINEARS, 3, 2) == 2 * (2 * attention + (3 + 2) * expert)
    assert floor.adapter_bytes(1, ["q_proj", "up_proj"], 2, 2) == 2 * 2 * (8 + 2 * 7)
    assert floor.adapter_bytes(1, LINEARS, 5, 0) == 0


def test_ceiling_of_throughput_counts_active_weights_in_prefill() -> None:
    floor = StepFloor(geometry("qwen3-30b-a3b").config, CEILINGS)
    active = 48 * (2048 * (4096 + 512 + 512 + 4096) + 2048 * 128 + 8 * 3 * 2048 * 768)
    assert floor.layer_weights == active
    # One output token each: nothing is decoded.
    assert floor.throughput_tok_s(64, 512, 1, 64, 0) == pytest.approx(8e14 / (512 * 2 * active))


@pytest.mark.parametrize("batch", [1, 5, 8])
def test_rows_of_decode_are_compared_with_what_their_tokens_touch(
    tmp_path: Path, batch: int
) -> None:
    made = made_sitting(tmp_path, "decode", decode.parse(SMALL))
    row = {"case": "decode", "system": "loramux", "batch": batch, "decode_ms": 4.0, "rank": 4}
    done = decode.finish(made, {**row, "adapters": batch, "lora": "enabled"})
    # One token an adapter: 2 of 8 experts each. Ranks 4, two layers, two bytes.
    attention, expert = (64 + 64) + 2 * (64 + 32) + (64 + 64), 3 * (64 + 32)
    num_bytes = batch * 2 * 4 * (attention + 2 * expert) * 2
    assert done["floor_added_ms"] == pytest.approx(num_bytes)
    floor = StepFloor(made.config, SLOW)
    context = 8 + 128 / 2
    assert done["floor_ms"] == round(floor.decode_ms(batch, context, num_bytes), 4)


# --- plans ---------------------------------------------------------------------------------------


def test_decode_plans_engines_for_a_mixture(tmp_path: Path) -> None:
    line = [*SMALL, "--batches", "1", "4", "--adapters", "0", "2"]
    plan = dict(decode.jobs(made_sitting(tmp_path, "decode", decode.parse(line))))
    assert list(plan) == ["lora-off", "max-loras-2"]
    job = plan["max-loras-2"]
    assert job.settings["load_format"] == "dummy" and job.settings["max_lora_rank"] == 4
    assert json.loads((Path(job.settings["model"]) / "config.json").read_text()) == job.config
    assert [(c["batch"], c["adapters"]) for c in job.cases] == [(1, 0), (4, 0), (4, 2)]
    assert len(job.adapters) == 2
    for folder in map(Path, job.adapters):
        tensors = load_file(folder / "adapter_model.safetensors")
        assert sum(".experts." in name for name in tensors) == 2 * 2 * 8 * len(OF_MLP)
        targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
        assert targets == list(LINEARS)


@pytest.mark.parametrize(("name", "least"), [("qwen3-30b-a3b", 1 << 30), ("tiny-moe", 1 << 30)])
def test_the_scratch_folder_has_room_for_the_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, least: int
) -> None:
    asked: list[int] = []

    def folder(num_bytes: int) -> AbstractContextManager[str]:
        asked.append(num_bytes)
        return nullcontext(str(tmp_path))

    monkeypatch.setattr(sitting, "scratch_folder", folder)
    argv = ["--geometry", name]
    options = decode.parse(argv)
    assert sit("decode", options, argv, lambda made: None, num_bytes=least, adapters=8) == 0
    assert asked == [8 * 1_687_683_072 if name == "qwen3-30b-a3b" else least]


# --- what is refused -----------------------------------------------------------------------------


def test_kernels_are_those_of_dense_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", *TINY, "--batches", "2", "--adapters", "2"]) == 1
    refusal = capsys.readouterr().err
    assert "'qwen3_moe' is a mixture of experts" in refusal and "profile" in refusal


def test_the_comparison_with_peft_is_of_dense_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="throughput --requests"):
        make_adapter(tmp_path / "a", geometry("tiny-moe").config, rank=4, seed=0)
    assert not (tmp_path / "a").exists()


def test_other_mixtures_are_refused_with_every_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = {"model_type": "mixtral", "decoder_sparse_step": 2, "mlp_only_layers": [0]}
    with pytest.raises(ValueError, match=r"'mixtral'.*\[0\].*step 2") as refusal:
        linears({**BY_HAND, **odd})
    assert "--geometry" in str(refusal.value)
    (tmp_path / "config.json").write_text(json.dumps({**BY_HAND, "model_type": "olmoe"}))
    # Floors would be wrong without adapters, too; nothing is started.
    assert main(["decode", "--model", str(tmp_path), "--adapters", "0"]) == 1
    assert "'olmoe'" in capsys.readouterr().err


def test_a_config_that_transformers_wrote_says_the_same(tmp_path: Path) -> None:
    shape = geometry("tiny-moe")
    config = AutoConfig.from_pretrained(write_model(tmp_path / "model", shape))
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "num_experts" not in again  # its own name for it is another
    assert linears(again) == linears(shape.config)
    floors = [StepFloor(c, CEILINGS).decode_ms(8, 100, 0) for c in (shape.config, again)]
    assert floors[0] == floors[1]


# --- on an engine --------------------------------------------------------------------------------


def check_decode(folder: Path, targets: list[str]) -> None:
    """Decode with and without adapters on `targets`, to the last column of the table."""
    sizes = ["--batches", "1", "2", "--adapters", "0", "2", "--repeats", "1", "--output-len", "6"]
    made = made_sitting(folder, "decode", decode.parse([*SMALL, *sizes, *targets]))
    for _, job in decode.jobs(made):
        for row in rows_of(job):
            made.take(decode.finish(made, row))
    rows = made.of("decode")
    assert [(row["batch"], row["adapters"], row["lora"]) for row in rows] == [
        *((1, 0, "off"), (2, 0, "off")),
        *((1, 0, "enabled"), (2, 0, "enabled"), (2, 2, "enabled")),
    ]
    assert all(row["decode_ms"] > 0 < row["floor_ms"] for row in rows)
    decode.show_table(made)


def test_decode_with_adapters_on_attention(tmp_path: Path) -> None:
    check_decode(tmp_path, ATTENTION)


def test_decode_with_adapters_on_experts(tmp_path: Path) -> None:
    check_decode(tmp_path, [])


def test_throughput_of_a_mixture(tmp_path: Path) -> None:
    words = "--requests 6 --adapters 0 3 --output-len 4 --max-loras 2"
    options = parse_throughput([*SMALL, *words.split(), *ATTENTION])
    made = made_sitting(tmp_path, "throughput", options)
    made.ceilings = CEILINGS
    for _, job in at_once.jobs(made):
        for row in rows_of(job):
            made.take(at_once.finish(made, row))
    rows = made.of("throughput")
    assert [row["adapters"] for row in rows] == [0, 3]
    assert all(row["throughput_tok_s"] > 0 for row in rows)
    # Two adapters are on the device, and six tokens in a step.
    floor, num_bytes = StepFloor(made.config, CEILINGS), 2 * (2 * 4 * 2 * 2 * (64 + 64))
    ceilings = [floor.throughput_tok_s(6, 8, 4, 6, size) for size in (0, num_bytes)]
    assert [row["ceiling_tok_s"] for row in rows] == [round(ceiling, 1) for ceiling in ceilings]
    assert ceilings[1] < ceilings[0]


def test_load_of_a_mixture(tmp_path: Path) -> None:
    words = "--streams 2 --loads 2 --quiet-steps 5 --max-loras 2"
    made = made_sitting(tmp_path, "load", load.parse([*SMALL, *words.split(), *ATTENTION]))
    rows = [row for row in rows_of(load.make_job(made)) if row["case"] == "load"]
    assert [row["places"] for row in rows] == [["disk"], ["host"]]
    num_bytes = 2 * 2 * 4 * 2 * (64 + 64)  # q and o of rank 4 in two layers
    floors = [load.finish(made, row)["floor_ms"] for row in rows]
    assert floors == [pytest.approx(2 * num_bytes), pytest.approx(num_bytes)]


def test_profile_of_a_mixture(tmp_path: Path) -> None:
    words = "--batches 2 --adapters 2 --prefill-tokens 32 --steps 4"
    made = made_sitting(tmp_path, "profile", profile.parse([*SMALL, *words.split(), *ATTENTION]))
    rows = [row for row in rows_of(profile.make_job(made)) if row["case"] == "profile"]
    assert {(row["step"], row["adapters"]) for row in rows} == {("decode", 2), ("prefill", 2)}
