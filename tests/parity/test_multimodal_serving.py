"""Requests with images and sound through the whole engine, against transformers' own uncached forward
under PEFT's adapters: mixed batches, small steps that cut through media, caches on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import BatchFeature

from loramux import LLM, LoRARequest, SamplingParams
from parity.multimodal import (
    FAMILIES,
    SAMPLING_RATE,
    MediaOracle,
    random_audio,
    random_image,
    save_adapter,
    save_model,
)

COUNT = 5
SERVED = [name for name in FAMILIES if name != "paligemma"]
# Its images are seen whole, so a step has room for one beside what else runs.
SETTINGS: dict[str, dict[str, Any]] = {"gemma3": {"max_num_batched_tokens": 96}}


@dataclass(frozen=True)
class Ask:
    """One prompt with what it carries, and the adapters that answer it."""

    text: str
    media: dict[str, list[Any]]
    composition: dict[str, float]


@dataclass(frozen=True)
class Case:
    name: str
    llm: LLM
    oracle: MediaOracle
    adapters: dict[str, Path]

    def lora(self, ask: Ask) -> list[LoRARequest]:
        return [
            LoRARequest(part, lora_path=str(self.adapters[part]), scale=scale)
            for part, scale in ask.composition.items()
        ]

    def inputs(self, ask: Ask) -> BatchFeature:
        images, audio = ask.media.get("image", ()), ask.media.get("audio", ())
        return self.oracle.inputs(ask.text, images, audio)

    def wanted(self, ask: Ask) -> list[int]:
        return self.oracle.greedy(self.inputs(ask), COUNT, ask.composition)

    def answers(self, asks: list[Ask]) -> list[Any]:
        prompts: list[Any] = []
        for ask in asks:
            media: dict[str, Any] = dict(ask.media)
            if "audio" in media:
                media["audio"] = [(sound, SAMPLING_RATE) for sound in media["audio"]]
            prompts.append({"prompt": ask.text, "multi_modal_data": media})
        params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
        return self.llm.generate(prompts, params, lora_request=[self.lora(ask) for ask in asks])


def served(name: str, folder: Path, **settings: Any) -> LLM:
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 256,
        "block_size": 8,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 48,
        "kv_cache_memory": "64MiB",
        "max_loras": 3,
        "max_lora_rank": 8,
        "enable_tower_connector_lora": True,
    }
    return LLM(str(folder), enable_lora=True, **defaults | SETTINGS.get(name, {}) | settings)


@pytest.fixture(scope="module", params=SERVED)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    name = request.param
    root = tmp_path_factory.mktemp(name)
    folder = save_model(root / "model", name)
    parts = [part for part, how in FAMILIES[name].parts.items() if "target_parameters" not in how]
    adapters = {
        part: save_adapter(folder, root / part, part, seed=seed) for seed, part in enumerate(parts)
    }
    with served(name, folder) as llm:
        yield Case(name, llm, MediaOracle(folder, adapters), adapters)


def media_of(modalities: dict[str, str], seed: int, count: int = 1) -> dict[str, list[Any]]:
    made: dict[str, list[Any]] = {}
    for modality in modalities:
        draw = random_image if modality == "image" else random_audio
        made[modality] = [draw(10 * seed + i) for i in range(count)]
    return made


def some(case: Case) -> list[Ask]:
    """Text alone and with items, one and several, under no adapter, one, and sums."""
    prompts = case.oracle.family.prompts
    all_of_them = " and ".join(prompts.values())
    parts = list(case.adapters)
    one = f"say {all_of_them} now"
    first = next(iter(prompts))
    two = f"{prompts[first]} or rather {prompts[first]} is it"
    asks = [Ask("only a text", {}, {}), Ask("only a text", {}, {parts[0]: 1.0})]
    asks += [Ask(one, media_of(prompts, 1), {part: 1.0}) for part in parts]
    asks += [
        Ask(one, media_of(prompts, 1), {}),
        Ask(two, media_of({first: ""}, 3, 2), {}),
        Ask(two, media_of({first: ""}, 3, 2), dict.fromkeys(parts[:3], 0.5)),
    ]
    return asks


def test_mixed_batches_answer_as_transformers_does(case: Case) -> None:
    asks = some(case)
    answers = case.answers(asks)
    for ask, answer in zip(asks, answers, strict=True):
        assert answer.prompt_token_ids == case.inputs(ask)["input_ids"][0].tolist()
        assert answer.outputs[0].token_ids == case.wanted(ask), ask.composition
    # With media, and with the adapters that they meet: nothing of it is without effect.
    assert len({tuple(answer.outputs[0].token_ids) for answer in answers}) > 3
    again = case.answers(asks)
    assert [a.outputs[0].token_ids for a in again] == [a.outputs[0].token_ids for a in answers]
    assert all(answer.num_cached_tokens > 0 for answer in again if len(answer.prompt_token_ids) > 8)
    case.llm.engine.check_integrity()


def test_the_same_image_behind_another_text_is_encoded_once(case: Case) -> None:
    prompts = case.oracle.family.prompts
    media = media_of(prompts, 77)
    texts = [f"{word} {' '.join(prompts.values())} ?" for word in ("what", "where is it then")]
    asks = [Ask(text, media, {}) for text in texts]
    answers, stats = [], []
    for ask in asks:
        answers += case.answers([ask])
        stats.append(case.llm.engine.stats())
    assert [a.outputs[0].token_ids for a in answers] == [case.wanted(ask) for ask in asks]
    assert stats[1].media_hits - stats[0].media_hits == len(prompts)


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_dora_on_every_part_answers_as_transformers_does(tmp_path: Path, name: str) -> None:
    folder = save_model(tmp_path / "model", name)
    adapters = {
        f"{part} {kind}": save_adapter(
            folder, tmp_path / f"{part}-{kind}", part, seed=seed, use_dora=kind == "dora"
        )
        for seed, part in enumerate(FAMILIES[name].parts)
        for kind in ("dora", "plain")
    }
    with served(name, folder) as llm:
        case = Case(name, llm, MediaOracle(folder, adapters), adapters)
        prompts = case.oracle.family.prompts
        text = f"say {' and '.join(prompts.values())} now"
        asks = [Ask(text, media_of(prompts, 1), {part: 1.0}) for part in adapters]
        asks += [Ask(text, media_of(prompts, 1), {})]
        asks += [Ask(text, media_of(prompts, 2), {"tower plain": 0.5, "tower dora": 1.0})]
        answers = case.answers(asks)
        for ask, answer in zip(asks, answers, strict=True):
            assert answer.outputs[0].token_ids == case.wanted(ask), ask.composition
        llm.engine.check_integrity()
