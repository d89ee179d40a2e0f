"""The tiny multimodal checkpoints and what is asked of them are fit to define what is right: processors
are the real ones, answers repeat, and media and adapters on every part of a model count."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchFeature

from parity.multimodal import (
    FAMILIES,
    MediaOracle,
    generate,
    random_audio,
    random_image,
    save_adapter,
    save_model,
)

COUNT = 5


@dataclass(frozen=True)
class Case:
    """A family's checkpoint and an adapter on each part, in one oracle and in folders."""

    name: str
    folder: Path
    adapters: dict[str, Path]
    oracle: MediaOracle

    @property
    def modalities(self) -> list[str]:
        return list(self.oracle.family.prompts)

    def media(self, **seeds: int) -> dict[str, list[Any]]:
        """One item of each modality, drawn from its seed or from 1."""
        made: dict[str, list[Any]] = {}
        if "image" in self.modalities:
            made["images"] = [random_image(seeds.get("image", 1))]
        if "audio" in self.modalities:
            made["audio"] = [random_audio(seeds.get("audio", 1))]
        return made

    def inputs(self, **seeds: int) -> BatchFeature:
        items = " and ".join(self.oracle.family.prompts.values())
        return self.oracle.inputs(f"say {items} now", **self.media(**seeds))

    def placeholders(self, inputs: BatchFeature, modality: str) -> int:
        """How many tokens stand for media of `modality`."""
        attribute = {"image": ("context_image_token", "image_token"), "audio": ("audio_token",)}
        words = self.oracle.processor.tokenizer
        token = next(getattr(words, a) for a in attribute[modality] if hasattr(words, a))
        return int((inputs["input_ids"] == words.convert_tokens_to_ids(token)).sum())


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name = request.param
    root = tmp_path_factory.mktemp(name)
    folder = save_model(root / "model", name)
    parts = FAMILIES[name].parts
    adapters = {
        part: save_adapter(folder, root / part, part, seed=seed) for seed, part in enumerate(parts)
    }
    return Case(name, folder, adapters, MediaOracle(folder, adapters))


def test_real_processors_make_many_tokens_of_an_item(case: Case) -> None:
    processor = type(case.oracle.processor)
    assert processor.__module__.startswith("transformers.models.")
    one = case.inputs()
    for modality in case.modalities:
        stands_for_it = case.oracle.family.prompts[modality]
        key = {"image": "images", "audio": "audio"}[modality]
        made = {"image": random_image, "audio": random_audio}[modality]
        two = case.oracle.inputs(f"{stands_for_it}or{stands_for_it}", **{key: [made(1), made(2)]})
        assert case.placeholders(one, modality) >= 4
        assert case.placeholders(two, modality) == 2 * case.placeholders(one, modality)
        # The model's own check: as many placeholders as there are embeddings.
        assert case.oracle.logits(two).isfinite().all()


def test_answers_repeat_with_a_cache_and_without(case: Case) -> None:
    inputs = case.inputs()
    answer = case.oracle.greedy(inputs, COUNT)
    assert case.oracle.greedy(inputs, COUNT) == answer
    assert case.oracle.generated(inputs, COUNT) == answer


def test_other_media_give_other_answers(case: Case) -> None:
    answer = case.oracle.greedy(case.inputs(), COUNT)
    for modality in case.modalities:
        others = [case.oracle.greedy(case.inputs(**{modality: seed}), COUNT) for seed in (2, 3, 4)]
        assert any(other != answer for other in others), modality


def test_adapters_on_every_part_count(case: Case) -> None:
    inputs = case.inputs()
    base = case.oracle.logits(inputs)[-1]  # [V]
    alone = {part: case.oracle.logits(inputs, {part: 1.0})[-1] for part in case.adapters}
    for part, logits in alone.items():
        assert (logits - base).abs().max() > 0.1, part
        if part == "language":
            continue
        together = case.oracle.logits(inputs, {"language": 0.5, part: 1.0})[-1]  # [V]
        assert (together - logits).abs().max() > 0.1, part
    assert torch.equal(case.oracle.logits(inputs)[-1], base)


def test_only_adapters_on_the_language_model_count_without_media(case: Case) -> None:
    if case.name == "paligemma":
        with pytest.raises(ValueError, match="`images` are expected"):
            case.oracle.inputs("say it now")
        return
    inputs = case.oracle.inputs("say it now")
    base = case.oracle.logits(inputs)
    for part in case.adapters:
        same = torch.equal(case.oracle.logits(inputs, {part: 1.0}), base)
        assert same == (part != "language"), part


def test_adapters_change_answers_of_conversations(case: Case) -> None:
    parts = [{"type": modality} for modality in case.modalities]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "what is it?"}]}]
    adapter = case.adapters["language"]
    base = generate(case.folder, messages, COUNT, **case.media())
    adapted = generate(case.folder, messages, COUNT, **case.media(), adapter=adapter)
    assert base != adapted
    inputs = case.oracle.inputs(messages, **case.media())
    assert case.oracle.greedy(inputs, COUNT, {"language": 1.0}) == adapted
    assert case.oracle.generated(inputs, COUNT, {"language": 1.0}) == adapted
