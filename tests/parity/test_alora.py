"""Activated LoRA against PEFT: where it begins, what shares a batch and a prefix with it."""

from __future__ import annotations

import random

import pytest

from gpu.replaying import WAYS, use_seen_runner
from loramux import LLM, LoRARequest, SamplingParams
from loramux.engine import engine, follower
from loramux.engine.gpu_runner import GpuRunner
from loramux.errors import InvalidField
from parity.alora import ActivatedOracle
from parity.moe import save_moe
from parity.oracle import Composition, requests_for
from ranks import thread_ranks  # noqa: F401
from tiny import VOCAB, save_adapter, save_model

COUNT = 8
A, B = [300, 301, 300], [310]
INVOKED = {"a": A, "b": B}
# Where each invocation is put into a prompt of so many tokens; None: nowhere.
ASKED: list[tuple[Composition, int, dict[str, int]]] = [
    ({}, 30, {"a": 7}),
    ({"plain": 1.0}, 30, {"a": 7}),
    ({"a": 1.0}, 37, {"a": 16}),  # at a block's first token
    ({"a": 1.0}, 41, {"a": 21}),  # amid a block
    ({"a": 1.0}, 23, {"a": 20}),  # the prompt's last tokens
    ({"a": 1.0}, 26, {"a": 0}),  # the prompt's first tokens
    ({"b": 1.0}, 33, {"b": 15}),
    ({"b": 1.0}, 33, {}),
    ({"a": 1.0}, 18, {"b": 3}),
    ({"plain": 0.7, "a": 1.0}, 35, {"a": 18}),
    ({"plain": 0.7, "a": 1.0}, 35, {}),
    ({"a": -0.5, "b": 1.0}, 44, {"a": 9, "b": 30}),
    ({"b": 2.0, "a": 1.0, "plain": 0.3}, 44, {"b": 9, "a": 13}),
    ({"b": 1.0, "a": 1.0}, 40, {"a": 25}),
]
COMPOSITIONS = [composition for composition, _, _ in ASKED]


def prompt_of(dice: random.Random, length: int, places: dict[str, int]) -> list[int]:
    """Random tokens, which invoke nothing by themselves."""
    prompt = [dice.randrange(3, 290) for _ in range(length)]
    for name, place in places.items():
        prompt[place : place + len(INVOKED[name])] = INVOKED[name]
    return prompt


class Case:
    def __init__(self, model, root, family_targets=None):
        targets = {"target_modules": family_targets} if family_targets else {}
        self.model = model
        self.paths = {
            "plain": save_adapter(model, root / "plain", seed=1, r=4, **targets),
            "a": save_adapter(
                model,
                root / "a",
                seed=2,
                r=8,
                alora_invocation_tokens=A,
                use_rslora=True,
                **targets,
            ),
            "b": save_adapter(model, root / "b", seed=3, r=3, alora_invocation_tokens=B, **targets),
        }
        self.oracle = ActivatedOracle(model, self.paths)
        dice = random.Random()
        self.prompts = [prompt_of(dice, length, places) for _, length, places in ASKED]
        self.expected = [
            self.oracle.greedy(prompt, composition, COUNT)
            for prompt, composition in zip(self.prompts, COMPOSITIONS, strict=True)
        ]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("alora")
    return Case(save_model(root / "model", "qwen3"), root)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("alora-experts")
    return Case(save_moe(root / "model", "qwen3_moe"), root, ["q_proj", "v_proj", "o_proj"])


GREEDY = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)


def check(case: Case, **settings) -> None:
    """Twice, so that prefixes of the first time are found, and one by one in another order."""
    with LLM(str(case.model), enable_lora=True, device="cpu", max_lora_rank=8, **settings) as llm:
        loras = requests_for(case.paths, COMPOSITIONS)
        for _ in range(2):
            outputs = llm.generate(case.prompts, GREEDY, lora_request=loras)
            assert [o.outputs[0].token_ids for o in outputs] == case.expected
        llm.engine.check_integrity()


def test_the_oracle_is_what_peft_generates(case: Case) -> None:
    for i, (composition, prompt) in enumerate(zip(COMPOSITIONS, case.prompts, strict=True)):
        if list(composition.values()) == [1.0]:
            (name,) = composition
            assert case.oracle.generated(prompt, name, COUNT) == case.expected[i]
    assert len({tuple(tokens) for tokens in case.expected}) > 8


@pytest.mark.parametrize(
    "settings",
    [
        {"max_loras": 3},
        {"max_loras": 3, "enable_prefix_caching": False},
        {"max_loras": 3, "block_size": 8, "max_num_batched_tokens": 16, "adapter_patience_s": 0.02},
        {"max_loras": 3, "block_size": 4, "max_num_batched_tokens": 24, "async_scheduling": True},
    ],
    ids=["roomy", "uncached", "chunked", "ahead"],
)
def test_tokens_equal_peft(case: Case, settings) -> None:
    check(case, **settings)


def test_preempted_sequences_equal_peft(case: Case) -> None:
    from loramux.config import EngineConfig
    from loramux.models.loader import load_model

    loaded = load_model(EngineConfig(model=str(case.model), device="cpu"))
    room = 200 * loaded.facts.kv_bytes_per_token
    check(case, max_loras=3, block_size=4, kv_cache_memory_bytes=room, max_model_len=60)


def test_the_packed_steps_of_gpus_equal_peft(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "make_runner", GpuRunner)
    check(case, max_loras=3, async_scheduling=True, kv_cache_memory_bytes=1 << 20, block_size=16)


@pytest.mark.parametrize("way", WAYS)
def test_replayed_steps_equal_peft(case: Case, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Captured steps of decodes and of whole prompts, in which adapters begin."""
    use_seen_runner(monkeypatch, "cpu")
    settings = {"cudagraph_capture_sizes": [1, 8, 64, 128, 256], "specialize_active_lora": True}
    with LLM(
        str(case.model),
        enable_lora=True,
        device="cpu",
        max_loras=3,
        max_lora_rank=8,
        kv_cache_memory_bytes=1 << 20,
        enable_prefix_caching=False,
        max_num_batched_tokens=256,
        **settings,
    ) as llm:
        llm.engine.runner.shrink(way)
        loras = requests_for(case.paths, COMPOSITIONS)
        outputs = llm.generate(case.prompts, GREEDY, lora_request=loras)
        assert [o.outputs[0].token_ids for o in outputs] == case.expected
        replays = [event for event in llm.engine.runner.events if event.kind == "replay"]
        assert any(event.tokens > event.rows for event in replays), "no prompt was replayed"


@pytest.mark.usefixtures("thread_ranks")
@pytest.mark.parametrize("runner", ["cpu", "packed"])
def test_ranks_equal_peft(case: Case, monkeypatch: pytest.MonkeyPatch, runner: str) -> None:
    if runner == "packed":
        monkeypatch.setattr(engine, "make_runner", GpuRunner)
        monkeypatch.setattr(follower, "make_runner", GpuRunner)
    check(case, max_loras=3, tensor_parallel_size=2, fully_sharded_loras=True)


@pytest.mark.parametrize("runner", ["cpu", "packed"])
def test_a_model_with_experts_equals_peft(
    experts: Case, monkeypatch: pytest.MonkeyPatch, runner: str
) -> None:
    if runner == "packed":
        monkeypatch.setattr(engine, "make_runner", GpuRunner)
    check(experts, max_loras=3, kv_cache_memory_bytes=1 << 20)


def test_every_answer_of_a_request_and_its_embedding(case: Case) -> None:
    """n > 1; and the hidden state of the prompt's last token, as PEFT's forward leaves it."""
    with LLM(str(case.model), enable_lora=True, device="cpu", max_loras=3, max_lora_rank=8) as llm:
        number = 11
        (lora,) = requests_for(case.paths, COMPOSITIONS[number : number + 1])
        drawn = SamplingParams(n=3, temperature=0, max_tokens=COUNT, ignore_eos=True)
        (output,) = llm.generate([case.prompts[number]], drawn, lora_request=[lora])
        assert [a.token_ids for a in output.outputs] == [case.expected[number]] * 3
        vectors = [
            llm.embed([case.prompts[i]], lora_request=requests_for(case.paths, [c]))[0]
            for i, c in enumerate(COMPOSITIONS)
        ]
        for prompt, composition, found in zip(case.prompts, COMPOSITIONS, vectors, strict=True):
            wanted = embedding(case.oracle, prompt, composition)
            assert found.outputs.embedding == pytest.approx(wanted.tolist(), abs=1e-4)
        with pytest.raises(InvalidField, match="activated LoRA"):
            llm.classify([[5, 6]], lora_request=LoRARequest("a", lora_path=str(case.paths["a"])))
        llm.engine.check_integrity()


def embedding(oracle: ActivatedOracle, prompt: list[int], composition: Composition):
    """[D], of length 1."""
    import torch

    states = {}
    norm = oracle.base.model.norm
    handle = norm.register_forward_hook(lambda _m, _i, out: states.update(last=out[0, -1]))
    try:
        oracle.logits_behind(prompt, [], composition)
    finally:
        handle.remove()
    return torch.nn.functional.normalize(states["last"].float(), dim=0)  # [D]


def test_blocks_before_the_invocation_are_shared_both_ways(case: Case, tmp_path) -> None:
    """A conversation of the base model, then adapters that evaluate it; and the other way round."""
    size, dice = 8, random.Random()
    paths = {
        name: save_adapter(
            case.model, tmp_path / name, seed=10 + i, alora_invocation_tokens=[300 + i]
        )
        for i, name in enumerate(("x", "y", "z"))
    }
    with LLM(
        str(case.model),
        enable_lora=True,
        device="cpu",
        max_loras=4,
        max_lora_rank=8,
        block_size=size,
    ) as llm:

        def cached(prompt, name=None, path=None) -> int:
            lora = None if name is None else LoRARequest(name, lora_path=str(path))
            return llm.generate([prompt], GREEDY, lora_request=lora)[0].num_cached_tokens

        for common in (5 * size, 5 * size + 3):
            talk = [dice.randrange(3, VOCAB - 40) for _ in range(common)]
            assert cached([*talk, 7]) == 0
            for i, (name, path) in enumerate(paths.items()):
                asked = [*talk, 300 + i, 5, 6]
                assert cached(asked, name, path) == 5 * size  # whole blocks before it
                assert (
                    cached([*asked, 9, *range(20, 40)], name, path) == (common + 3) // size * size
                )
            assert cached([*talk, 300, 5, 6], "plain", case.paths["plain"]) == 0
            fresh = [dice.randrange(3, VOCAB - 40) for _ in range(common)]
            assert cached([*fresh, 301, 5], "y", paths["y"]) == 0
            assert cached([*fresh, 302, 5], "z", paths["z"]) == 5 * size
            assert cached([*fresh, 4, 5]) == 5 * size
            # One that is not invoked is the base model; one that is invoked early shares nothing.
            assert cached([*fresh, 4, 5, 6], "x", paths["x"]) == 5 * size
            assert cached([300, *fresh[1:], 4], "x", paths["x"]) == 0
        llm.engine.check_integrity()


def test_a_replaced_version_shares_the_base_prefix_only(case: Case, tmp_path) -> None:
    dice = random.Random()
    talk = [dice.randrange(3, 290) for _ in range(32)]
    prompt = [*talk, *A, *(dice.randrange(3, 290) for _ in range(30))]
    other = save_adapter(case.model, tmp_path / "new", seed=99, r=8, alora_invocation_tokens=A)
    oracle = ActivatedOracle(case.model, {"a": case.paths["a"], "new": other})
    with LLM(
        str(case.model), enable_lora=True, device="cpu", max_loras=2, max_lora_rank=8, block_size=8
    ) as llm:
        for path, name, cached in ((case.paths["a"], "a", 0), (other, "new", 32)):
            llm.engine.add_adapter("judge", str(path), replace=True)
            for again in (cached, 64):
                (out,) = llm.generate([prompt], GREEDY, lora_request=LoRARequest("judge"))
                assert out.outputs[0].token_ids == oracle.greedy(prompt, {name: 1.0}, COUNT)
                assert out.num_cached_tokens == again


def test_an_adapter_that_is_not_invoked_is_named(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    with LLM(str(case.model), enable_lora=True, device="cpu", max_loras=3, max_lora_rank=8) as llm:
        loras = requests_for(case.paths, COMPOSITIONS)
        outputs = llm.generate(case.prompts, GREEDY, lora_request=loras)
    found = [set(output.not_invoked) for output in outputs]
    wanted = [{n for n in c if n in INVOKED and n not in places} for c, _, places in ASKED]
    assert found == wanted
    said = [r.getMessage() for r in caplog.records if "was not invoked" in r.getMessage()]
    assert len(said) == 2 and "'a'" in "".join(said) and "'b'" in "".join(said)
