"""Adapters on the experts and routers of mixture-of-experts models, in every layout they come in, give
what transformers gives with the same differences in its weights; and what PEFT gives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loramux import LLM, SamplingParams
from loramux.engine import engine, follower
from loramux.engine.gpu_runner import GpuRunner
from parity.moe import MadeAdapter, MergedOracle, make_adapter, save_moe
from parity.oracle import Composition, assert_logprobs_equal, requests_for
from ranks import thread_ranks  # noqa: F401
from tiny import VOCAB

COUNT = 5
SETTINGS = {"device": "cpu", "max_loras": 2, "max_lora_rank": 7, "adapter_patience_s": 0.02}
SETTINGS |= {"max_model_len": 128, "kv_cache_memory_bytes": 32 << 20}
MIXED: list[Composition] = [
    {},
    {"matrices": 1.0},
    {"tensors": 1.0},
    {"outer": -0.5},
    {"matrices": 0.7, "outer": 1.0},
    {"tensors": 0.5, "matrices": -1.0},
]


MIXED += [{"large": 1.0}]


def names_of_old(name: str) -> str:
    """What Mixtral's checkpoints call their layers of experts."""
    return name.replace(".mlp.", ".block_sparse_moe.")


def old_mixtral(root: Path, model: Path) -> dict[str, MadeAdapter]:
    more = {"names": names_of_old, "projections": ("w1", "w3", "w2")}
    return {
        "a": make_adapter(model, root / "a", "per_expert", seed=1, router="mlp.gate", **more),
        "b": make_adapter(
            *(model, root / "b", "per_expert"),
            **{"seed": 2, "r": 3, "rank_pattern": {"gate": 5, "down": 2}, "skipped": (1,), **more},
        ),
        "c": make_adapter(model, root / "c", "per_expert", seed=3, parts=("down",), **more),
    }


def matrices(root: Path, model: Path) -> dict[str, MadeAdapter]:
    return {
        "a": make_adapter(model, root / "a", "per_expert", seed=1, router="mlp.gate"),
        "b": make_adapter(
            *(model, root / "b", "per_expert"),
            **{"seed": 2, "r": 3, "rank_pattern": {"gate": 5, "down": 2}, "skipped": (0, 2)},
        ),
        "c": make_adapter(model, root / "c", "per_expert", seed=3, parts=("up",)),
    }


def tensors(root: Path, model: Path) -> dict[str, MadeAdapter]:
    return {
        "a": make_adapter(model, root / "a", "fused", seed=1, router="mlp.router"),
        "b": make_adapter(model, root / "b", "fused", seed=2, r=3, parts=("down",)),
        "c": make_adapter(model, root / "c", "fused", seed=3, r=7, parts=("gate", "up")),
    }


NATURAL = {
    "mixtral": old_mixtral,
    "qwen2_moe": matrices,
    "qwen3_moe": matrices,
    "olmoe": matrices,
    "deepseek_v2": matrices,
    "gpt_oss": tensors,
}


def prompts_for(compositions: Sequence[Composition]) -> list[list[int]]:
    dice = random.Random(5)
    return [[dice.randrange(3, VOCAB) for _ in range(dice.randrange(5, 30))] for _ in compositions]


def answers_equal(
    model: Path, made: dict[str, MadeAdapter], compositions: list[Composition], **settings: object
) -> None:
    oracle, prompts = MergedOracle(model, made), prompts_for(compositions)
    expected = [oracle.greedy(p, c, COUNT) for p, c in zip(prompts, compositions, strict=True)]
    paths = {name: adapter.path for name, adapter in made.items()}
    with LLM(str(model), enable_lora=True, **{**SETTINGS, **settings}) as llm:
        params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=2)
        outputs = llm.generate(prompts, params, lora_request=requests_for(paths, compositions))
        assert llm.engine.stats().device_evictions > 0
        llm.engine.check_integrity()
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert len({tuple(answer) for answer in expected}) == len(expected)
    for output, prompt, composition in zip(outputs, prompts, compositions, strict=True):
        assert_logprobs_equal(output.outputs[0], prompt, composition, oracle)  # type: ignore[arg-type]


@pytest.fixture
def gpu_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed steps of GPUs, on a CPU."""
    monkeypatch.setattr(engine, "make_runner", GpuRunner)
    monkeypatch.setattr(follower, "make_runner", GpuRunner)


OWN: list[Composition] = [
    *({}, {"a": 1.0}, {"b": 1.0}, {"c": 1.0}, {"large": 1.0}, {"a": 0.5, "b": -1.0}, {"b": 2.0}),
]


def with_a_large_one(root: Path, model: Path, family: str) -> dict[str, MadeAdapter]:
    """Those of the family, and one more, so that not all have a place at once."""
    linears = ("o_proj",)
    large = make_adapter(model, root / "large", "fused", seed=9, r=7, parts=(), linears=linears)
    return {**NATURAL[family](root, model), "large": large}


@pytest.mark.parametrize("family", list(NATURAL))
def test_the_models_own_layout(tmp_path: Path, family: str) -> None:
    model = save_moe(tmp_path / "model", family)
    answers_equal(model, with_a_large_one(tmp_path, model, family), OWN)


@pytest.mark.usefixtures("gpu_runner")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_models_own_layout_in_packed_steps(tmp_path: Path, family: str) -> None:
    model = save_moe(tmp_path / "model", family)
    answers_equal(model, with_a_large_one(tmp_path, model, family), OWN, async_scheduling=True)


@pytest.mark.parametrize("packed", [False, True], ids=["cpu", "packed"])
def test_a_deployment_for_experts_alone(
    tmp_path: Path, packed: bool, request: pytest.FixtureRequest
) -> None:
    """No linear layer has a pool."""
    if packed:
        request.getfixturevalue("gpu_runner")
    model = save_moe(tmp_path / "model", "qwen3_moe")
    made = {
        name: make_adapter(
            *(model, tmp_path / name, "per_expert"),
            **{"seed": seed, "r": 6, "parts": ("gate", "up"), "linears": ()},
        )
        for seed, name in enumerate("abc", 1)
    }
    compositions: list[Composition] = [
        {},
        {"a": 1.0},
        {"b": 1.0},
        {"c": -1.0},
        {"a": 0.5, "c": 1.0},
    ]
    targets = ["experts.gate_proj", "experts.up_proj"]
    answers_equal(model, made, compositions, target_modules=targets)


def every_layout(root: Path, model: Path) -> dict[str, MadeAdapter]:
    return {
        "matrices": make_adapter(model, root / "matrices", "per_expert", seed=1, skipped=(3,)),
        "tensors": make_adapter(model, root / "tensors", "fused", seed=2, r=5),
        "outer": make_adapter(model, root / "outer", "outer", seed=3, r=3),
        "large": make_adapter(model, root / "large", "fused", seed=4, r=7, linears=("k_proj",)),
    }


@pytest.mark.parametrize("packed", [False, True], ids=["cpu", "packed"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_every_layout_in_one_batch(
    tmp_path: Path, family: str, packed: bool, request: pytest.FixtureRequest
) -> None:
    if packed:
        request.getfixturevalue("gpu_runner")
    model = save_moe(tmp_path / "model", family)
    made = every_layout(tmp_path, model)
    answers_equal(model, made, MIXED, enable_mixed_moe_lora_format=True)


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("fully", [False, True], ids=["default", "fully"])
@pytest.mark.parametrize(
    ("size", "packed"), [(2, False), (2, True), (4, False)], ids=["2-cpu", "2-packed", "4-cpu"]
)
def test_over_ranks(
    tmp_path: Path, size: int, fully: bool, packed: bool, request: pytest.FixtureRequest
) -> None:
    if packed:
        request.getfixturevalue("gpu_runner")
    model = save_moe(tmp_path / "model", "qwen3_moe", num_key_value_heads=4)
    made = every_layout(tmp_path, model) | {
        "router": make_adapter(model, tmp_path / "router", "per_expert", seed=4, router="mlp.gate")
    }
    compositions = [*MIXED, {"router": 1.0}]
    settings = {"tensor_parallel_size": size, "fully_sharded_loras": fully}
    answers_equal(model, made, compositions, enable_mixed_moe_lora_format=True, **settings)


PEFTS = [
    *(
        (family, layout)
        for family in ("mixtral", "qwen3_moe")
        for layout in ("per_expert", "fused")
    ),
    ("gpt_oss", "fused"),  # the only layout that PEFT has for it
]


@pytest.mark.parametrize(("family", "layout"), PEFTS)
def test_what_is_right_is_what_peft_gives(tmp_path: Path, family: str, layout: str) -> None:
    """The oracle of this file against PEFT, reading the same files."""
    model = save_moe(tmp_path / "model", family)
    more = {}
    if (family, layout) == ("mixtral", "per_expert"):
        more = {"names": names_of_old, "projections": ("w1", "w3", "w2")}
    router = "mlp.router" if family == "gpt_oss" else "mlp.gate"
    made = make_adapter(model, tmp_path / "a", layout, seed=1, router=router, **more)
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    peft = PeftModel.from_pretrained(base.eval(), made.path)
    ids = prompts_for([{}])[0]
    with torch.no_grad():
        theirs = peft(input_ids=torch.tensor([ids]), use_cache=False).logits[0]  # [T, V]
    ours = MergedOracle(model, {"a": made}).logits(ids, {"a": 1.0})  # [T, V]
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)
