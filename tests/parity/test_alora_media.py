"""Activated LoRA behind and before an image, against PEFT on transformers' own model."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from peft.tuners.lora.variants import ALoraLinearVariant

from loramux import LLM, LoRARequest, SamplingParams
from loramux.errors import AdapterRejected, InvalidField
from parity.multimodal import MediaOracle, random_image, save_adapter, save_model

COUNT = 6
INVOKED = "zqz"
PLACES = ["look {} and zqz now", "look zqz at {} now", "zqz {} it is", "look {} zqz", "look {} now"]
# Images of gemma3 are seen whole, so a step has room for one.
TOKENS = {"llava": 24, "gemma3": 96, "qwen2-vl": 24}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_equal_peft(name: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", name)
    oracle = MediaOracle(model)
    invocation = oracle.processor.tokenizer.encode(INVOKED, add_special_tokens=False)
    activated = {"alora_invocation_tokens": invocation, "task_type": "CAUSAL_LM"}
    path = save_adapter(model, tmp_path / "a", "language", **activated)
    oracle = MediaOracle(model, {"a": path})
    image = random_image(3)
    texts = [place.format(oracle.family.prompts["image"]) for place in PLACES]
    wanted, prompts = [], []
    for text in texts:
        inputs = oracle.inputs(text, [image])
        prompt = inputs["input_ids"][0].tolist()
        wanted.append(greedy(oracle, inputs, _offset(prompt, invocation)))
        prompts.append({"prompt": text, "multi_modal_data": {"image": [image]}})
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
    with LLM(
        str(model),
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
        dtype="float32",
        max_model_len=256,
        block_size=8,
        max_num_seqs=6,
        max_num_batched_tokens=TOKENS[name],
        kv_cache_memory="64MiB",
    ) as llm:
        for _ in range(2):
            lora = LoRARequest("a", lora_path=str(path))
            answers = llm.generate(prompts, params, lora_request=lora)
            assert [a.outputs[0].token_ids for a in answers] == wanted
        assert [a.not_invoked for a in answers] == [(), (), (), (), ("a",)]
        assert len({tuple(tokens) for tokens in wanted}) > 2
        inside = save_adapter(
            model,
            tmp_path / "inside",
            "language",
            alora_invocation_tokens=[_filler(llm, prompts[0])],
            task_type="CAUSAL_LM",
        )
        with pytest.raises(InvalidField, match="begins inside the tokens of an image"):
            llm.generate(prompts[:1], params, lora_request=LoRARequest("i", lora_path=str(inside)))
        llm.engine.check_integrity()


def _offset(prompt: list[int], invocation: list[int]) -> int | None:
    count = len(invocation)
    found = [i for i in range(len(prompt)) if prompt[i : i + count] == invocation]
    return len(prompt) - found[-1] if found else None


def _filler(llm: LLM, prompt: dict) -> int:
    """The token that stands for the image in the engine."""
    prepared = llm.engine.media.prepare(prompt["prompt"], _media(prompt))
    return prepared.token_ids[prepared.items[0].spans[-1][1] - 1]


def _media(prompt: dict) -> list:
    from loramux.media.in_memory import image_in_memory

    return [image_in_memory(prompt["multi_modal_data"]["image"][0])]


def greedy(oracle: MediaOracle, inputs, offset: int | None) -> list[int]:
    applied, tokens = ALoraLinearVariant.forward, []
    for more in range(COUNT):

        def forward(module, active_adapter, x, result, more=more, **_):
            own = [None if offset is None else offset + more]
            return applied(module, active_adapter, x, result, alora_offsets=own)

        with mock.patch.object(ALoraLinearVariant, "forward", staticmethod(forward)):
            tokens.append(int(oracle.logits(inputs, {"a": 1.0})[-1].argmax()))
        inputs = oracle.followed_by(inputs, tokens[-1:])
    return tokens


def test_none_is_served_on_towers(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llava")
    both = r".*(language_model\.layers\.\d+\.self_attn\.q_proj|vision_tower.*fc1)"
    path = save_adapter(
        model,
        tmp_path / "a",
        "language",
        target_modules=both,
        alora_invocation_tokens=[5],
        task_type="CAUSAL_LM",
    )
    settings = {"enable_lora": True, "max_loras": 2, "max_model_len": 128, "dtype": "float32"}
    with (
        LLM(str(model), enable_tower_connector_lora=True, **settings) as llm,
        pytest.raises(AdapterRejected, match=r"alora_invocation_tokens with LoRA on .*fc1"),
    ):
        llm.engine.add_adapter("a", str(path))
