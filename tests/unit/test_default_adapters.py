"""Which adapters a request with media gets: by its modalities, and before them by its own choice."""

from __future__ import annotations

from typing import Any

import pytest

from loramux.config import EngineConfig, LoRAConfig, ModelFacts, resolve
from loramux.engine.default_adapters import (
    choose_adapters,
    default_int_ids,
    default_name,
    default_sources,
    is_default,
)
from loramux.errors import ConfigError, InvalidField
from loramux.server.adapter_paths import check_name
from loramux.types import AdapterUse

BOTH = {"image": "/adapters/i", "audio": "/adapters/a"}


def names(uses: tuple[AdapterUse, ...]) -> list[str]:
    assert all(use.scale == 1.0 for use in uses)
    return [use.name for use in uses]


def config(policy: str = "compose", paths: dict[str, str] | None = None) -> LoRAConfig:
    settings: dict[str, Any] = {"default_mm_loras_policy": policy}
    return LoRAConfig(max_loras=4, default_mm_loras=paths or BOTH, **settings)


@pytest.mark.parametrize("policy", ["compose", "refuse", "none"])
def test_one_modality_gets_its_adapter_under_each_policy(policy: str) -> None:
    lora = config(policy)
    assert names(choose_adapters(lora, {"image"})) == ["~image"]
    assert names(choose_adapters(lora, ["audio"])) == ["~audio"]
    assert names(choose_adapters(lora, {"audio", "video"})) == ["~audio"], "video has no adapter"
    assert choose_adapters(lora, {"video"}) == choose_adapters(lora, ()) == ()


def test_several_modalities() -> None:
    carried = {"image", "audio"}
    assert names(choose_adapters(config("compose"), carried)) == ["~audio", "~image"]
    assert choose_adapters(config("none"), carried) == ()
    with pytest.raises(InvalidField, match="audio and image") as caught:
        choose_adapters(config("refuse"), carried)
    assert caught.value.field == "lora"


@pytest.mark.parametrize("policy", ["compose", "refuse", "none"])
def test_one_folder_for_two_modalities_is_one_adapter(policy: str) -> None:
    lora = config(policy, {"image": "/x/both", "audio": "/x/../x/both/", "video": "/y"})
    assert len(choose_adapters(lora, {"image", "audio"})) == 1
    if policy == "compose":
        assert len(choose_adapters(lora, {"image", "audio", "video"})) == 2


@pytest.mark.parametrize("policy", ["compose", "refuse", "none"])
@pytest.mark.parametrize("explicit", [[], [AdapterUse("mine", 0.5)], [AdapterUse("a")] * 2])
def test_an_explicit_choice_wins(policy: str, explicit: list[AdapterUse]) -> None:
    assert choose_adapters(config(policy), {"image", "audio"}, explicit) == tuple(explicit)


def test_without_defaults_nothing_is_chosen() -> None:
    for lora in (None, LoRAConfig(), LoRAConfig(default_mm_loras={})):
        assert choose_adapters(lora, {"image"}) == ()
        assert default_sources(lora) == [] and default_int_ids(lora) == {}


def test_ids_follow_the_alphabet() -> None:
    lora = config(paths={"video": "v", "image": "i", "audio": "a"})
    assert default_sources(lora) == [("~audio", "a"), ("~image", "i"), ("~video", "v")]
    assert default_int_ids(lora) == {"~audio": 1, "~image": 2, "~video": 3}


@pytest.mark.parametrize("modality", ["image", "audio", "video"])
def test_no_caller_can_have_such_a_name(modality: str) -> None:
    name = default_name(modality)
    assert is_default(name) and not is_default(modality)
    with pytest.raises(InvalidField):
        check_name(name)


def facts(*modalities: str) -> ModelFacts:
    return ModelFacts("float32", "cpu", 512, 1024, 1 << 30, modalities=modalities)


def start(lora: LoRAConfig, *modalities: str) -> EngineConfig:
    return resolve(EngineConfig(model="m", lora=lora), facts(*modalities))


def test_a_start_that_fits() -> None:
    resolved = start(LoRAConfig(max_loras=2, default_mm_loras=BOTH), "image", "audio", "video")
    assert resolved.lora is not None and resolved.lora.default_mm_loras == BOTH
    start(LoRAConfig(default_mm_loras={"image": "p"}), "image")
    start(LoRAConfig(default_mm_loras={"image": "p", "audio": "p"}), "image", "audio")
    for policy in ("refuse", "none"):
        lora = LoRAConfig(default_mm_loras=BOTH, default_mm_loras_policy=policy)
        start(lora, "image", "audio")
    start(LoRAConfig(default_mm_loras={}))


def test_a_text_model_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"default_mm_loras names image.*is a text model"
    ) as caught:
        start(LoRAConfig(default_mm_loras={"image": "p"}))
    assert caught.value.field == "default_mm_loras"


def test_everything_that_does_not_fit_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        start(LoRAConfig(default_mm_loras=BOTH), "image")
    said = str(caught.value)
    assert "names audio, and the model takes image" in said
    assert "2 adapters" in said and "max_loras is 1" in said and "--max-loras to 2" in said
